"""Two processes that train together, started, watched and ended by a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def results_of(worker: str, folder: Path, ranks: int, seconds: float) -> list[Any]:
    """What each rank of a worker module saved, run as ``python -m worker RANK RENDEZVOUS RESULT``."""
    results = [folder / f"rank{rank}.pt" for rank in range(ranks)]
    meeting = str(folder / "rendezvous")
    commands = [["-m", worker, str(rank), meeting, str(result)] for rank, result in enumerate(results)]
    run_together(commands, folder, seconds)
    return [torch.load(result) for result in results]


def run_together(commands: Sequence[Sequence[str]], folder: Path, seconds: float) -> None:
    """Run Python with each of these arguments at once, from the repository's root; rank r is the r-th.

    Raises:
        AssertionError: If one fails or all are not done in time, with the end of what each wrote; none is left running.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(len(commands))]
    processes = []
    for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
        # What Lightning asks for, to leave the starting of processes to others.
        own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(len(commands)), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=os.environ | own,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    written = "\n".join(f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * len(codes), f"exit codes {codes} (-9: killed)\n{written}"


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all are done, or time is up, or one failed and the others had their chance to say why."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if any(codes):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)
