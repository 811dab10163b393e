"""Which tests run in the same of pytest-xdist's workers."""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """A file's tests run in one worker, which makes the file's fixtures once; tests with two ranks all run in one.

    xdist's own groups, ``--dist loadgroup``, do not work with pytest 9.2, whose node ids cannot be changed.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        with_ranks = file.parent.name == "distributed" or file.stem.endswith(("_ddp", "_ranks"))
        return "two ranks" if with_ranks else str(file)
