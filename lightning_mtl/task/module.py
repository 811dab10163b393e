"""TaskModule is a module with tasks as the step, the methods and the monitors see one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_mtl.task.sharing import Sharing
from lightning_mtl.task.task import Task, TaskOutput
from lightning_mtl.task.units import Standardizers
from lightning_mtl.trunk import TrunkParts


class Depth(NamedTuple):
    """Parameters that go by a learning rate of their own: ``factor`` times that of the part they belong to."""

    name: str
    parameters: frozenset[nn.Parameter]
    factor: float


class TaskModule(pl.LightningModule):
    """What the training step asks of a module; users meet :class:`~lightning_mtl.BalancedModule`, which answers.

    Attributes:
        tasks: What was declared of each task.
        accumulate_grad_batches: Micro-batches an optimizer step, where the module takes the steps.
        gradient_clip_val: What gradients are clipped to, likewise.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        max_skipped_steps: How many steps in a row may be skipped because something is not finite.
        schedules: The schedulers as they were asked for.
        target_units: What standardizes targets, of the tasks that ask for it, by task.
        learned_tasks: The tasks that train; the others count as absent from every batch. None stands for all.
        present_tasks: The tasks that some rank's micro-batch has; None outside of a training step.
        delta_m_over: The tasks whose baselines ``val/delta_m`` compares with: ``"all"``, or the ``"main"`` ones alone.
        sharing: What the steps' graphs say about shared parameters; None where the module says it itself.
        evaluate_with_gradients: Whether validation, test and prediction have autograd on, for losses that
            differentiate the model themselves.
        recorder: What is told of each step, to log it.
        depths: Parts of the model with learning rates of their own, as a callback that unfreezes them gives them.
    """

    tasks: dict[str, Task]
    target_units: Standardizers
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str
    max_skipped_steps: int
    schedules: list[LRSchedulerConfig]
    learned_tasks: frozenset[str] | None = None
    present_tasks: Sequence[str] | None = None
    delta_m_over: Literal["all", "main"] = "all"
    sharing: Sharing | None = None
    evaluate_with_gradients: bool = False
    recorder: Any  # of a layer above
    depths: tuple[Depth, ...] = ()
    train_task_metrics: nn.ModuleDict
    _trunk_parts: TrunkParts | None = None

    # Not by the names that a user's own parts may have.

    @property
    def the_trunk(self) -> nn.Module | None:
        """The shared part whose outputs heads read; None where a module has none."""
        return None

    @property
    def the_heads(self) -> Mapping[str, nn.Module]:
        """One part a task; empty where a module has none."""
        return {}

    def check_place(self, method: str, at: str | Sequence[str]) -> None:
        """Refuse to measure gradients at what the module does not have.

        Raises:
            ValueError: If that is a trunk's output or its last layer, and there is no trunk.
        """
        if self.the_trunk is None and at in ("features", "last_layer"):
            what = "output" if at == "features" else "last layer"
            raise ValueError(
                f"{method}(at={at!r}) measures gradients at a trunk's {what}, and {type(self).__name__} has no trunk. "
                f"Use {method}(at='trunk'), which stands for all parameters that two or more tasks reach, or name "
                "modules as in module.named_modules(): at=['encoder']."
            )

    def in_known_form(self, batch: Any) -> Any:  # noqa: ANN401
        """Bring a batch into one of the forms that are read outside of ``task_losses``; others stay as they are."""
        return batch

    @property
    @abstractmethod
    def trunk_parts(self) -> TrunkParts:
        """What the trunk and its parts say of themselves."""

    @abstractmethod
    def present_outputs(self, batch: Any, without: Set[str] = frozenset()) -> dict[str, TaskOutput]:  # noqa: ANN401
        """The checked outputs of the tasks that a batch has labels for, in order; none of tasks ``without``."""

    @abstractmethod
    def task_losses(self, batch: Any) -> Mapping[str, Tensor | TaskOutput]:  # noqa: ANN401
        """The losses that a batch has labels for, by task."""

    @abstractmethod
    def penalties(self) -> dict[str, Tensor]:
        """Scalars added to the objective with weight 1."""

    @abstractmethod
    def penalties_with(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The penalties in a step in which some rank has ``tasks``."""

    @abstractmethod
    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that tasks share."""

    @property
    @abstractmethod
    def stage_scores(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """For each stage, what its last epoch gave each task that had samples."""

    @property
    @abstractmethod
    def opens_window(self) -> bool:
        """Whether the next micro-batch begins an optimizer step."""

    @property
    def gives_rates(self) -> bool:
        """Whether the module's arguments give a part a learning rate of its own."""
        return False

    @property
    def micro_batches_a_step(self) -> int:
        """How many micro-batches an optimizer step takes, whoever accumulates them."""
        return self.trainer.accumulate_grad_batches if self.automatic_optimization else self.accumulate_grad_batches

    def stage_metrics(self, stage: str) -> dict[str, MetricCollection]:
        """The metrics of each task that has some, for ``"train"``, ``"val"`` or ``"test"``."""
        return dict(getattr(self, f"{stage}_task_metrics").items())
