"""The torchrun line of the guide to several devices, as two nodes of one process each on this machine."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.node import train
from tests.test_readme import commands_of

ROOT = Path(__file__).parents[2]


def on_this_machine(words: list[str], script: list[str]) -> list[str]:
    """The page's command, but for a process a node, a free port of this machine, and a script that is here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    replaced = {"--nproc-per-node": "1", "--rdzv-endpoint": f"127.0.0.1:{port}"}
    options = [replaced.get(before, word) for before, word in itertools.pairwise(words)]
    assert options[-1] == "train.py"
    # The agents find each other by the endpoint; a name of its own keeps the machine's out of it.
    return [sys.executable, "-m", "torch.distributed.run", *options[:-1], "--local-addr", "127.0.0.1", "-m", *script]


@pytest.mark.slow  # two agents that import torch twice each
def test_the_readmes_torchrun_line_trains_two_nodes_as_one_process(tmp_path: Path) -> None:
    (words,) = [
        words
        for words in commands_of("docs/guides/several_devices.md")
        if words[0] == "torchrun" and "--nnodes" in words
    ]
    assert words[words.index("--nnodes") + 1] == "2"
    command = on_this_machine(words, ["tests.distributed.node", str(tmp_path / "trained.pt"), "2"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [tmp_path / f"node{index}.log" for index in range(2)]
    nodes = []
    try:
        for path in logs:
            with path.open("wb") as log:
                nodes.append(
                    subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        expected = train(1)
        codes = [node.wait(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert codes == [0, 0], "\n".join(path.read_text()[-3000:] for path in logs)
    trained, size = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert size == 2
    torch.testing.assert_close(trained, expected, rtol=1e-6, atol=1e-6)
