"""Compares the cost of a multi-task model with that of a model for each task: parameters, multiply-adds, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_mtl.architectures.costs import as_trained, latency_ms, multiply_adds, parameters_behind
from lightning_mtl.monitors.figures import draw_bars
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid
from lightning_mtl.task.batches import call_trunk_with
from lightning_mtl.task.module import TaskModule
from lightning_mtl.trunk import TrunkParts, outermost

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = ("", "parameters", "shared", "own", "multiply-adds", "ms")


@dataclass(frozen=True)
class Cost:
    """Holds the cost of one model, for all tasks at once or for one.

    Attributes:
        name: The task, or the name of the row.
        parameters: All that take part in its predictions.
        shared: Those of them that several tasks of the multi-task model use.
        own: Those that one task alone uses.
        multiply_adds: Of a forward pass: matrix products, convolutions, recurrent layers and attention, of which a
            causal mask saves nothing; what is element by element is not counted.
        milliseconds: The median forward pass.

    Example:
        >>> Cost("age", parameters=107, shared=40, own=67, multiply_adds=1560, milliseconds=0.25).cells()
        ('age', '107', '40', '67', '1,560', '0.250')
    """

    name: str
    parameters: int
    shared: int
    own: int
    multiply_adds: int
    milliseconds: float

    def cells(self) -> tuple[str, ...]:
        """Return the cost as a row of the table."""
        counts = (self.parameters, self.shared, self.own, self.multiply_adds)
        return (self.name, *(f"{count:,}" for count in counts), f"{self.milliseconds:.3f}")


@dataclass(frozen=True)
class ParameterReport(Report):
    """Compares the multi-task model with the models of single tasks and their sum; ``print`` it, or ``rich.print`` it.

    Attributes:
        multi_task: All tasks by one model.
        single_task: ``{task: cost}`` of each task's model.
        idle: Parameters of the multi-task model that no prediction depends on.
        assumption: What the single-task models were taken to be.

    Example:
        >>> both, age = Cost("all", 107, 40, 67, 560, 0.5), Cost("age", 49, 40, 9, 400, 0.25)
        >>> report = ParameterReport(both, {"age": age, "smile": age}, idle=0, assumption="Made up.")
        >>> report.single_task_total.parameters, round(report.ratios["multiply_adds"], 2)
        (98, 0.7)
    """

    multi_task: Cost
    single_task: Mapping[str, Cost]
    idle: int
    assumption: str

    @property
    def single_task_total(self) -> Cost:
        """Return the sum over the single-task models."""
        costs = list(self.single_task.values())
        return Cost(
            f"{len(costs)} single-task models",
            sum(cost.parameters for cost in costs),
            sum(cost.shared for cost in costs),
            sum(cost.own for cost in costs),
            sum(cost.multiply_adds for cost in costs),
            sum(cost.milliseconds for cost in costs),
        )

    @property
    def ratios(self) -> dict[str, float]:
        """Divide the multi-task model by the sum of the single-task models; below 1 the multi-task model is cheaper."""
        one, many = self.multi_task, self.single_task_total
        return {
            name: getattr(one, name) / getattr(many, name) if getattr(many, name) else float("nan")
            for name in ("parameters", "multiply_adds", "milliseconds")
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's rows as text, in the order of :data:`COLUMNS`."""
        ratios = self.ratios
        last = (
            f"{ratios['parameters']:.2f}",
            "",
            "",
            f"{ratios['multiply_adds']:.2f}",
            f"{ratios['milliseconds']:.2f}",
        )
        costs = [*self.single_task.values(), self.single_task_total, self.multi_task]
        return [*(cost.cells() for cost in costs), ("multi-task / single-task", *last)]

    def __str__(self) -> str:
        return f"{self._grid().text()}\n{self._caption()}"

    def _grid(self) -> Grid:
        grid = Grid(COLUMNS)
        rows = self.rows()
        for position, row in enumerate(rows):
            grid.add(*row)
            if position in (len(rows) - 4, len(rows) - 2):  # below the last task, and above the ratios
                grid.end_section()
        return grid

    def _caption(self) -> str:
        idle = f" {self.idle:,} parameters take part in no prediction." if self.idle else ""
        return f"{self.assumption}{idle}"

    def shown(self) -> Shown:
        """Return the table of costs and ratios."""
        return Shown(self._grid(), "Cost of a forward pass", self._caption())

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return a row for each single-task model, for their sum, and for the multi-task model."""
        costs = [*self.single_task.values(), self.single_task_total, self.multi_task]
        return [field.name for field in fields(Cost)], [astuple(cost) for cost in costs]

    def figure(self) -> Figure:
        """Draw the single-task models as one bar and the multi-task model as the other, for each kind of cost.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        many, one = self.single_task_total, self.multi_task
        kinds = {"parameters": "parameters", "multiply-adds": "multiply_adds", "ms": "milliseconds"}
        costs = [*self.single_task.values()]
        bars = {
            kind: [{cost.name: getattr(cost, name) for cost in costs}, {one.name: getattr(one, name)}]
            for kind, name in kinds.items()
        }
        return draw_bars(bars, [many.name, one.name], title="Cost of a forward pass")

    def __rich__(self) -> Table:
        return self.table()


def parameter_report(
    module: TaskModule,
    inputs: Any,  # noqa: ANN401 - whatever the trunk takes
    *,
    single_task: Mapping[str, nn.Module] | None = None,
    repeats: int = 30,
) -> ParameterReport:
    """Compare a multi-task model with a model for each of its tasks: parameters, multiply-adds and time.

    Everything is measured in evaluation mode, without gradients, on the device and in the precision that the module
    has. The multi-task model's parameters are those that some prediction depends on: what a hardened branching trunk
    left aside is counted as idle.

    Args:
        module: A multi-task module.
        inputs: A batch's inputs, as the trunk takes them; times and multiply-adds are for this batch.
        single_task: ``{task: module}``, each called with ``inputs``: the models to compare with. None derives them: a
            trunk's ``single_task(task)`` with the task's head, where it, or a part inside it, has such a method
            (``SoftSharing``, ``CrossStitch``, ``LTB``); else the trunk, asked for this task alone, and the task's head,
            without the parts that only other tasks use. A trunk that cannot be asked for one task computes all: then
            the multiply-adds of others are left out as far as they are done by modules with parameters, and the time
            is that of the whole trunk.
        repeats: Forward passes behind each median.

    Raises:
        ValueError: If ``repeats`` is below 1, or ``single_task`` does not name the module's tasks.

    Example:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> from lightning_mtl import MultiTaskModule, Task
        >>> heads = {"a": nn.Linear(8, 1), "b": nn.Linear(8, 2)}
        >>> module = MultiTaskModule(nn.Linear(4, 8), heads, {task: Task(mse_loss) for task in heads})
        >>> report = parameter_report(module, torch.zeros(10, 4), repeats=3)
        >>> report.multi_task.parameters, report.multi_task.shared, report.multi_task.multiply_adds
        (67, 40, 560)
        >>> report.single_task_total.parameters, round(report.ratios["parameters"], 2)
        (107, 0.63)
    """
    if module.the_trunk is None:
        raise ValueError(
            f"parameter_report asks a trunk and heads for one task alone, which {type(module).__name__} has not; use "
            "a MultiTaskModule."
        )
    if repeats < 1:
        raise ValueError(f"parameter_report(repeats={repeats}) must be at least 1.")
    tasks = list(module.tasks)
    if single_task is not None and single_task.keys() != set(tasks):
        raise ValueError(f"parameter_report(single_task=...) names {sorted(single_task)}, but the tasks are {tasks}.")
    alone = {task: single_task[task] if single_task else _alone(module, task) for task in tasks}
    with as_trained(module, *alone.values()):
        used = {task: parameters_behind(module, partial(_predict, module, task, inputs)) for task in tasks}
        users = Counter(parameter for parameters in used.values() for parameter in parameters)
        costs = {}
        for task, model in alone.items():
            run = partial(_predict, module, task, inputs) if model is module else partial(model, inputs)
            needed = parameters_behind(model, run)
            costs[task] = _cost(task, model, run, needed, users, repeats)
        whole = _cost("multi-task model", module, partial(module, inputs), list(users), users, repeats)
    held = sum(p.numel() for part in (module.the_trunk, *module.the_heads.values()) for p in part.parameters())
    return ParameterReport(whole, costs, held - whole.parameters, _assumption(module.the_trunk, single_task))


def _cost(
    name: str,
    model: nn.Module,
    run: Callable[[], Any],
    needed: Sequence[nn.Parameter],
    users: Mapping[nn.Parameter, int],
    repeats: int,
) -> Cost:
    total = sum(p.numel() for p in needed)
    shared = sum(p.numel() for p in needed if users.get(p, 0) > 1)
    adds = multiply_adds(model, run, needed)
    return Cost(name, total, shared, total - shared, adds, latency_ms(model, run, repeats))


def _predict(module: Any, task: str, inputs: Any) -> Any:  # noqa: ANN401 - a MultiTaskModule, of the layer above
    """Predict one task alone."""
    return module._predict_each({task: inputs})


class _SingleTaskModel(nn.Module):
    """The part of a trunk that a task has to itself, and the task's head."""

    def __init__(self, trunk: nn.Module, head: nn.Module, task: str, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk, self.head, self.task = trunk, head, task
        self.parts = TrunkParts(trunk, tasks)

    def forward(self, inputs: Any) -> Any:  # noqa: ANN401 - whatever the trunk takes and the head returns
        features = self.parts.call(*call_trunk_with(inputs, self.trunk), [self.task])
        split = self.parts.nested and isinstance(features, Mapping) and self.task in features
        return self.head(features[self.task] if split else features)


def _alone(module: TaskModule, task: str) -> nn.Module:
    own = module.trunk_parts.single_task(task)
    return module if own is None else _SingleTaskModel(own, module.the_heads[task], task, list(module.tasks))


def _assumption(trunk: nn.Module, single_task: Mapping[str, nn.Module] | None) -> str:
    if single_task is not None:
        return "Single-task models: as given."
    if parts := [type(part).__name__ for _, part in outermost(trunk, "single_task")]:
        return f"Single-task models: what {' and '.join(parts)} has for one task, and the task's head."
    return "Single-task models: the trunk, without what only other tasks use, and the task's head."
