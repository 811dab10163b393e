"""Runs tests on copies of the tree, in processes that have imported what takes the longest before they begin."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutation import ROOT, Mutation

PARTS = ("lightning_mtl", "tests", "examples", "benchmarks")
SECONDS = 600

# Importing PyTorch and Lightning takes seconds, most tests do not: the processes are forked from one that has them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "lightning.pytorch", "scipy.stats"])


class Run(NamedTuple):
    """Pytest's exit code, None if it could not be run to its end; the seconds taken; what was printed."""

    code: int | None
    seconds: float
    output: str


def run(tests: str, keyword: str, mutation: Mutation | None) -> Run:
    """Run some tests on a copy of the tree, with a mutation or without."""
    # Lightning has imported a package that brings a plugin, which pytest would have liked to do first.
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", tests]
    arguments += ["-k", keyword] if keyword else []
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy, log, code = Path(folder, "copy"), Path(folder, "log"), Path(folder, "code")
        copy_tree(copy)
        if mutation is not None:
            mutation.apply(copy)
        started = time.monotonic()
        process = PROCESSES.Process(target=run_pytest, args=(copy, arguments, log, code))
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        printed = log.read_text(errors="replace") if log.exists() else ""
        return Run(int(code.read_text()) if code.exists() else None, time.monotonic() - started, printed)


def copy_tree(copy: Path) -> None:
    """Copy what tests read, compiled files included: they are as old as their sources, which saves compiling."""
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in PARTS:
            shutil.copytree(entry, copy / entry.name)
        elif entry.is_file() and not entry.name.startswith("."):
            shutil.copy2(entry, copy)


def run_pytest(copy: Path, arguments: list[str], log: Path, code: Path) -> None:
    """Run pytest in this process, which imports the copy and nothing of the tree it came from.

    The exit code goes to a file: that of the process would be 1 after any exception, as after a failed test.
    """
    os.chdir(copy)
    os.environ.update({"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"})
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in PARTS]:
        del sys.modules[name]
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import pytest  # here, so that its plugins are new to each process

    code.write_text(str(int(pytest.main(arguments))))
