"""One process of a pair: runs the calls that a test sends, one after the other, each in a process group of its own.

python -m tests.distributed.rank RANK DESCRIPTOR
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.conftest import pytest_configure as be_quiet
from tests.distributed.pairs import RANKS, Call

COLLECTIVE_SECONDS = 20


def serve(rank: int, connection: Connection) -> None:
    """Answer calls until the test process hangs up; after an error the state is unknown, so the process ends."""
    while True:
        try:
            call: Call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            result = run(call, rank)
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            raise
        connection.send_bytes(pickle.dumps((True, result)))


def run(call: Call, rank: int) -> Any:
    """The call's result. Nothing that it sets for the process remains: no group, no variable, no folder, no filter."""
    environment, folder, hook = dict(os.environ), Path.cwd(), sys.excepthook
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, line in call.filters:
            warnings.filterwarnings(action, message, category, module, line, append=True)
        try:
            if call.meeting is not None:
                # A file to meet at: nobody else can take it, as one could take a free port.
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{call.meeting}",
                    rank=rank,
                    world_size=RANKS,
                    timeout=timedelta(seconds=COLLECTIVE_SECONDS),
                )
            return call.function(*call.arguments, rank, RANKS)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            sys.excepthook = hook  # torch wraps it once more with every process group


if __name__ == "__main__":
    faulthandler.enable()
    be_quiet()
    serve(int(sys.argv[1]), Connection(int(sys.argv[2])))
