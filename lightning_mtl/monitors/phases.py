"""Where a step's time goes, noted only while somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Phases:
    """Splits a stretch of time into named phases; a phase within a phase is taken out of the outer one.

    While nobody listens a phase costs an empty context. While somebody does, a CUDA device is waited for at each change
    of phase, since its work would otherwise count where the processor happens to wait for it.

    Example:
        >>> phases = Phases()
        >>> phases.listen(torch.device("cpu"))
        >>> with phases.during("outer"), phases.during("inner"):
        ...     pass
        >>> sorted(phases.stop())
        ['inner', 'outer', 'rest']
    """

    def __init__(self) -> None:
        self.listening = False
        """Whether somebody asks."""
        self.during: Callable[[str], AbstractContextManager[object]] = nullcontext
        """Counts the block that follows to the phase that it is called with."""
        self._device: torch.device | None = None
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def waiting(self, name: str) -> AbstractContextManager[object]:
        """As :attr:`during`, for those who keep it from before somebody asks."""
        return self.during(name)

    def listen(self, device: torch.device) -> None:
        """Begin anew."""
        self._device, self.listening, self.during = device, True, self._counted
        self._seconds, self._open = {}, ["rest"]
        self._since = self._now()

    def stop(self) -> dict[str, float]:
        """Fall silent; return the seconds of each phase, and of the rest, since :meth:`listen`."""
        self._settle()
        self._device, self.listening, self.during = None, False, nullcontext
        return self._seconds

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            if self.listening:  # or it was stopped from within
                self._settle()
                self._open.pop()

    def _settle(self) -> None:
        """Give the time since the last change to the phase that is under way."""
        now = self._now()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
