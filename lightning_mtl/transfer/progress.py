"""One display for many trainings: which of them runs, and how many there are."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import Self

from lightning_mtl.monitors.fit_table import FitTable

# Lightning logs several lines for each Trainer and each seed.
_TALKATIVE = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")

# Warnings that a fit gives alike each time: of the logging interval, and of units, which is what searches vary.
OF_EVERY_FIT = (
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "In the first step the loss of",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what each Trainer of many says of itself, inside the block; other warnings, and errors, are shown."""
    before = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in before:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 builds torch's LeafSpec by hand, which torch 2.13 deprecates, once a batch.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            for each_time in OF_EVERY_FIT:
                warnings.filterwarnings("ignore", each_time)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


class Progress:
    """Shows how far a series of trainings is, on standard error and on rank 0, and silences what each would say.

    A terminal gets one bar with the time left; a file, or a notebook, a line for each training.

    Args:
        who: What runs the trainings.
        total: How many there are.
        done: How many of them are done already.
        show: Whether to show anything, and to silence anything.

    Example:
        >>> with Progress("single_task_baselines", 2, show=False) as progress:
        ...     for seed in (0, 1):
        ...         progress.begin(f"task age, seed {seed}")
    """

    def __init__(self, who: str, total: int, *, done: int = 0, show: bool = True) -> None:
        self.who, self.total = who, total
        self.show = show
        self.done = done
        self._shown = show and getattr(rank_zero_only, "rank", 0) == 0
        self._bar: tqdm[None] | None = None
        self._silence = ExitStack()

    def __enter__(self) -> Self:
        self._silence.enter_context(quiet() if self.show else nullcontext())
        if self._shown and sys.stderr.isatty():
            # What a search logs of its trials goes above the bar.
            self._silence.enter_context(logging_redirect_tqdm([logging.getLogger("optuna")]))
            self._bar = tqdm(total=self.total, initial=self.done, desc=self.who, leave=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._silence.close()

    def begin(self, what: str) -> None:
        """Say which training begins now, after those that are done; it counts as done when the next one begins."""
        self.done += 1
        if self._bar is not None:
            self._bar.n, self._bar.total = self.done - 1, self.total
            self._bar.set_postfix_str(what)
        elif self._shown:
            sys.stderr.write(f"{self.who} {self.done}/{self.total}: {what}\n")

    def only(self, trainer: pl.Trainer) -> pl.Trainer:
        """Return the Trainer without progress bars, summaries and tables of its own."""
        return without_displays(trainer) if self.show else trainer


def without_displays(trainer: pl.Trainer) -> pl.Trainer:
    """Return the Trainer without progress bars, summaries and tables: it is one of many."""
    own = (ProgressBar, ModelSummary, FitTable)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, own)]  # type: ignore[attr-defined]
    return trainer
