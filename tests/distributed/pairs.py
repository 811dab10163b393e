"""Two processes that stay for a whole test run and train together whatever a test sends them."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS = 2
GRACE = 5  # seconds that the other rank gets to say what went wrong


@dataclass(frozen=True)
class Call:
    """What a rank is to run, ``function(*arguments, rank, RANKS)``, under the warning filters of the test."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    filters: Sequence[Any]
    meeting: Path | None


class Pair:
    """Starts two ranks at the first call, and anew after an error or when time was up.

    Args:
        folder: For what the ranks print, and the files where they meet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = itertools.count()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection[bytes, bytes]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120, meets: bool = True) -> list[Any]:
        """What each rank returns from ``function(*arguments, rank, RANKS)``.

        Args:
            function: At the top of a module, so that it can be sent by name.
            arguments: Anything that can be pickled.
            seconds: After which both ranks are killed.
            meets: Whether a process group is there when the function is called; if not, it makes its own.

        Raises:
            AssertionError: If a rank fails or is not done in time, with the traceback of each.
        """
        if not self.processes:
            self._start()
        meeting = self.folder / f"meeting{next(self.number)}" if meets else None
        filters = [(action, _text(text), kind, _text(module), line) for action, text, kind, module, line in _filters()]
        call = pickle.dumps(Call(function, arguments, filters, meeting))
        for connection in self.connections:
            connection.send_bytes(call)
        answers = self._answers(time.monotonic() + seconds)
        if len(answers) < RANKS or not all(done for done, _ in answers.values()):
            self.close()  # shows where a rank stands that did not answer
            said = [answers.get(rank, (False, self._log(rank).read_text()[-4000:]))[1] for rank in range(RANKS)]
            raise AssertionError("\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(said)))
        return [answers[rank][1] for rank in range(RANKS)]

    def close(self) -> None:
        """End both, wherever they are; each writes its stack to its log."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.send_signal(signal.SIGABRT)
        for process in self.processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:  # noqa: PERF203 - of two processes
                process.kill()
                process.wait()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        for rank in range(RANKS):
            ours, theirs = Pipe()
            # What Lightning asks for, to leave the starting of processes to others.
            own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.rank", str(rank), str(theirs.fileno())],
                    cwd=ROOT,
                    env=os.environ | own,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def _answers(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """What the ranks sent until the deadline, which an error brings near."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self.connections, range(RANKS), strict=True))
        while waiting and time.monotonic() < deadline:
            for ready in wait([*waiting], max(0.0, deadline - time.monotonic())):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    answers[rank] = pickle.loads(ready.recv_bytes())
                except EOFError:  # the process has ended, its log says why
                    deadline = min(deadline, time.monotonic() + GRACE)
                    continue
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def _filters() -> list[Any]:
    return list(warnings.filters)


def _text(pattern: Any) -> str:
    return getattr(pattern, "pattern", pattern) or ""
