"""Measures how useful a trunk is for a task that it was not trained on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mtl.metrics import Interval
from lightning_mtl.module import MultiTaskModule, check_parts
from lightning_mtl.monitors.figures import draw_curves
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid, marked
from lightning_mtl.task import Task
from lightning_mtl.training.schedulers import LRSchedulerCallable, OptimizerCallable
from lightning_mtl.transfer.finished import chosen_scores, interval_of, of_seeds
from lightning_mtl.transfer.progress import Progress
from lightning_mtl.transfer.runs import TrainerFactory, fit_and_score, fresh, metric_directions, seeded
from lightning_mtl.trunk import takes_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ProbeTask = Mapping[str, Task]


class FrozenTrunk(nn.Module):
    """Keeps a trunk as it is: in every mode no gradient, no dropout and no update of running statistics.

    Example:
        >>> frozen = FrozenTrunk(nn.Sequential(nn.Linear(2, 2), nn.Dropout())).train()
        >>> frozen.training, any(p.requires_grad for p in frozen.parameters())
        (False, False)
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.train()

    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the trunk takes and returns
        """Pass the inputs through the trunk."""
        with torch.no_grad():
            return self.trunk(*inputs, **named)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stay in evaluation mode."""
        super().train(False)
        return self


@dataclass(frozen=True)
class ProbeResult(Report):
    """Holds the scores of a new head on a frozen trunk, and of the same model trained from scratch.

    A score that is not finite stands for a run that diverged. Table, picture and advantage are over the seeds that both
    trunks finished, and "(n of N seeds)" marks what did not finish all.

    Args:
        task: The new task's name.
        metric: The score that is compared.
        higher_is_better: Its direction.
        num_samples: Numbers of training samples.
        frozen: For each number of samples, a score for each seed: the trunk frozen.
        scratch: The same from a trunk that learned from these samples alone.

    Example:
        >>> result = ProbeResult("age", "loss", False, [10], [[0.5, 0.7]], [[0.9, 0.8]])
        >>> result.advantage(10).mean
        0.25
    """

    task: str
    metric: str
    higher_is_better: bool
    num_samples: Sequence[int]
    frozen: Sequence[Sequence[float]]
    scratch: Sequence[Sequence[float]]

    def advantage(self, num_samples: int) -> Interval:
        """Return how much better the frozen trunk is, in the metric's own unit; pairs of a seed are compared.

        Raises:
            ValueError: If this number of samples was not tried.
        """
        if num_samples not in self.num_samples:
            raise ValueError(f"advantage(num_samples={num_samples}) must be among {list(self.num_samples)}.")
        sign = 1 if self.higher_is_better else -1
        return interval_of(
            [sign * (own - other) for own, other in self._pairs(list(self.num_samples).index(num_samples))]
        )

    def _pairs(self, position: int) -> list[tuple[float, float]]:
        """Both scores of the seeds that both trunks finished."""
        both = zip(self.frozen[position], self.scratch[position], strict=True)
        return [pair for pair in both if all(map(math.isfinite, pair))]

    def shown(self) -> Shown:
        """Return the table of both trunks' scores, and of the advantage with its interval."""
        grid = Grid(["samples", "frozen trunk", "from scratch", "advantage"])
        for position, number in enumerate(self.num_samples):
            cells = []
            for place, own in enumerate((self.frozen[position], self.scratch[position])):
                mean = marked(interval_of([pair[place] for pair in self._pairs(position)]), sign="", digits=3).text
                cells.append(mean.partition(" [")[0] + of_seeds(sum(map(math.isfinite, own)), len(own)))
            grid.add(str(number), *cells, marked(self.advantage(number), digits=3))
        way = "higher" if self.higher_is_better else "lower"
        return Shown(grid, f"{self.task}: {self.metric}, {way} is better", "positive is better")

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return every score, a row each: samples, trunk, place of the seed, and the score under the metric's name."""
        return ("samples", "trunk", "seed", self.metric), [
            (number, trunk, seed, score)
            for trunk, scores in (("frozen", self.frozen), ("scratch", self.scratch))
            for number, own in zip(self.num_samples, scores, strict=True)
            for seed, score in enumerate(own)
        ]

    def figure(self) -> Figure:
        """Draw both scores over the number of samples.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        curves = {}
        for place, (name, scores) in enumerate({"frozen trunk": self.frozen, "from scratch": self.scratch}.items()):
            finished = sum(math.isfinite(score) for own in scores for score in own)
            marks = of_seeds(finished, sum(map(len, scores))).replace("seeds", "runs")
            pairs = map(self._pairs, range(len(self.num_samples)))
            curves[name + marks] = [interval_of([pair[place] for pair in own]) for own in pairs]
        return draw_curves(curves, self.num_samples, title=f"{self.task}: {self.metric}", axis="training samples")


def probe_transfer(
    module: MultiTaskModule,
    task: ProbeTask,
    head: Callable[[], nn.Module],
    datamodule: tuple[Dataset[Any], Any],
    trainer_factory: TrainerFactory,
    *,
    num_samples: Sequence[int],
    seeds: Sequence[int] = (0,),
    metric: str | None = None,
    trunk: Callable[[], nn.Module] | None = None,
    batch_size: int = 32,
    optimizer: OptimizerCallable = torch.optim.Adam,
    lr_scheduler: LRSchedulerCallable | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Fit a head for an unseen task on the frozen trunk, and the whole model from scratch, on the same n samples.

    The samples of a seed are drawn once and in an order, so that fewer samples are part of more; head, samples and
    their order are the same for both trunks. Both get the same Trainer, so that both should have steps enough: a budget
    in steps, ``max_steps=``, lets few samples be seen as often as they must, one in epochs does not. They are evaluated
    at the end alone, so that no callback can stop or choose by the evaluation data.

    Args:
        module: A trained module. It is left as it is; its trunk is copied. Where that returns a dict with an entry for
            every task, the head is given the whole dict.
        task: ``{name: Task}``, the new task.
        head: Called without arguments for a fresh head, which takes the trunk's output.
        datamodule: A data set to draw training samples from, and a loader to evaluate with. A sample is
            ``(inputs, target)`` or ``(inputs, {name: target})``, and so is a batch of the loader.
        trainer_factory: Called without arguments for a fresh Trainer, twice for each seed and number of samples.
        num_samples: Numbers of training samples.
        seeds: One pair of models for each: the samples, the head and the fresh trunk are drawn anew.
        metric: The score to compare, ``"loss"`` or a metric of the task; None takes its first.
        trunk: Called without arguments for a fresh trunk of the same architecture. None copies the module's and calls
            ``reset_parameters()`` of all modules in it.
        batch_size: Of the training batches; the last one of an epoch may be smaller.
        optimizer: Called with the parameters, returns the optimizer.
        lr_scheduler: Called with the optimizer, returns a scheduler stepped once an epoch.
        progress: Show one display for all runs, on standard error, in place of the Trainers' own.

    Raises:
        ValueError: If there is not one task, a number of samples is not in the data set, or ``trunk`` is needed since
            the module's cannot be reset.

    Source: the linear probe of Alain and Bengio, Understanding intermediate layers using linear classifier probes,
    2016, arXiv:1610.01644, with any head, over numbers of samples.

    Example:
        >>> unseen = {"beard": Task(cross_entropy, MulticlassAccuracy(2))}  # doctest: +SKIP
        >>> head = lambda: nn.Linear(128, 2)  # doctest: +SKIP
        >>> data = (faces_with_beards, val_loader)  # doctest: +SKIP
        >>> probe_transfer(model, unseen, head, data, trainer, num_samples=[50, 500]).table()  # doctest: +SKIP
    """
    check_parts(module, "probe_transfer")
    name, directions = _checked(task, metric, num_samples, seeds, datamodule)
    chosen = next(iter(directions[name]))
    fresh_trunk = trunk or _resetting(module.trunk)
    samples, evaluation = datamodule

    def run(subset: Subset[Any], seed: int, trained_from: str, trainer: pl.Trainer) -> float:
        with seeded(seed):
            made = head()
            own_trunk = FrozenTrunk(deepcopy(module.trunk)) if trained_from == "frozen trunk" else fresh_trunk()
        if takes_tasks(own_trunk):
            own_trunk.takes_tasks = False  # type: ignore[assignment]  # it knows nothing of the new task
        probe = _Probe(own_trunk, {name: made}, task, optimizer=optimizer, lr_scheduler=lr_scheduler)
        loader = DataLoader(subset, batch_size=batch_size, shuffle=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the frozen trunk
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
            # Few samples make short epochs: to evaluate after each would take most of the time.
            found = fit_and_score(probe, (loader, evaluation), trainer, seed=seed, stage="val", watched=False)
        return chosen_scores(found, directions)[name][chosen]

    scores: dict[str, list[list[float]]] = {"frozen trunk": [], "from scratch": []}
    with Progress("probe_transfer", 2 * len(num_samples) * len(seeds), show=progress) as shown:
        for number in num_samples:
            for own in scores.values():
                own.append([])
            for seed in seeds:
                order = torch.randperm(_number_of_samples(samples), generator=torch.Generator().manual_seed(seed))
                subset = Subset(samples, order[:number].tolist())
                for trained_from, own in scores.items():
                    shown.begin(f"task {name}, {number} samples, seed {seed}, {trained_from}")
                    trainer = shown.only(fresh(trainer_factory()))
                    own[-1].append(run(subset, seed, trained_from, trainer))
    return ProbeResult(name, chosen, directions[name][chosen], tuple(num_samples), *scores.values())


class _Probe(MultiTaskModule):
    """A model of one task, whose batches may be ``(inputs, target)``."""

    def task_losses(self, batch: Any) -> Any:  # noqa: ANN401 - whatever the loader yields
        """Give a target without a name the task's name."""
        if isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[1], Mapping):
            batch = batch[0], {next(iter(self.tasks)): batch[1]}
        return super().task_losses(batch)


def _checked(
    task: object,
    metric: str | None,
    num_samples: Sequence[int],
    seeds: Sequence[int],
    data: Any,  # noqa: ANN401 - what is checked here
) -> tuple[str, dict[str, dict[str, bool]]]:
    if not isinstance(task, Mapping) or len(task) != 1:
        raise ValueError(f"probe_transfer(task=...) must be one named task, {{name: Task(...)}}, found {task!r}.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"probe_transfer(seeds={tuple(seeds)}) must be one or more, each once.")
    if not (isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "__len__")):
        raise ValueError(
            "probe_transfer(datamodule=...) must be a pair: a data set with a length, to draw from, and a loader to "
            "evaluate with."
        )
    wrong = [number for number in num_samples if not 1 <= number <= len(data[0])]
    if wrong or not num_samples:
        raise ValueError(
            f"probe_transfer(num_samples={list(num_samples)}) must be numbers from 1 to {len(data[0])}, the size of "
            "the data set."
        )
    return next(iter(task)), metric_directions(task, None if metric is None else [metric])


def _number_of_samples(samples: Any) -> int:  # noqa: ANN401 - torch's Dataset has no __len__ of its own
    return len(samples)


def _resetting(trunk: nn.Module) -> Callable[[], nn.Module]:
    """A function that makes the trunk anew, as far as its modules know how to.

    Raises:
        ValueError: If a parameter or buffer belongs to a module that does not.
    """
    for name, part in trunk.named_modules():
        own = [key for key, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
        if own and not callable(getattr(part, "reset_parameters", None)):
            raise ValueError(
                f"{type(part).__name__} {name!r} of the trunk has {own} and no reset_parameters(); give probe_transfer("
                "trunk=...) a function that makes a fresh trunk."
            )

    def fresh_trunk() -> nn.Module:
        made = deepcopy(trunk).requires_grad_(True)
        for part in made.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        return made

    return fresh_trunk
