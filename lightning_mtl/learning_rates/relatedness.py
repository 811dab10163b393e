"""Learning rates by how related a task is to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from lightning_mtl.distributed import Ranks, gather
from lightning_mtl.learning_rates.factor import Collected, Factor, moved
from lightning_mtl.method.base import weighting_of
from lightning_mtl.method.signals import Signals, cosines
from lightning_mtl.method.task_state import Declared
from lightning_mtl.task import TaskOutput
from lightning_mtl.task.module import TaskModule


def aligned(
    outputs: Mapping[str, TaskOutput],
    tasks: Sequence[str],
    what: Literal["targets", "predictions"],
    limit: int,
    device: torch.device,
) -> Tensor:
    """Stack one micro-batch's targets, or predicted classes, of all tasks.

    Args:
        outputs: The outputs of the tasks that the batch has.
        tasks: All tasks.
        what: ``"targets"`` or ``"predictions"``.
        limit: Take at most so many elements, evenly spread; dense targets have one for each pixel.
        device: Where the result lies if the batch has no task.

    Returns:
        ``[K, n]``, float32, nan for the tasks that the batch lacks.

    Raises:
        ValueError: If a task has none, or not one for each sample of the others.
    """
    columns: dict[str, Tensor] = {}
    for task, output in outputs.items():
        value = output.target if what == "targets" else output.prediction
        if value is None:
            raise ValueError(
                f"The relatedness of tasks is measured on their {what}, and task {task!r} came without; return "
                "TaskOutput(loss, prediction, target) from task_losses."
            )
        value = value.detach()
        columns[task] = (value if what == "targets" else _classes(value)).reshape(-1)
    lengths = {task: column.numel() for task, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The relatedness of tasks is measured on one number a task for each sample, but the {what} of a batch "
            f"hold {lengths} of them; give every task a target for the same samples (nan where a label is missing, "
            "or none at all), or measure the gradients' cosine."
        )
    length = next(iter(lengths.values()), 0)
    if length > limit:
        spread = torch.arange(limit, device=device) * length // limit
        columns = {task: column[spread] for task, column in columns.items()}
    values = torch.full((len(tasks), min(length, limit)), torch.nan, device=device)
    for position, task in enumerate(tasks):
        if task in columns:
            values[position] = columns[task]
    return values


def _classes(prediction: Tensor) -> Tensor:
    """The predicted class: the largest along dimension 1; of one number, whether it passes a half, or as a logit 0."""
    if not prediction.is_floating_point():
        return prediction
    if prediction.ndim > 1 and prediction.shape[1] > 1:
        return prediction.argmax(1)
    probable = ((prediction >= 0) & (prediction <= 1)).all()
    return prediction > torch.where(probable, 0.5, 0.0)


def of_all_ranks(values: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Concatenate the micro-batches' ``[K, n]`` of all ranks, to the same tensor on each of them."""
    return gather(torch.cat(list(values), dim=1), ranks, dim=1)


RelatednessMeasure = Literal[
    "gradient_cosine", "target_correlation", "target_mutual_information", "prediction_mutual_information"
]


def correlation(x: Tensor, y: Tensor) -> float:
    """Compute the absolute value of Pearson's correlation, in [0, 1]; 0 where one of the two never changes.

    Example:
        >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, -2.0]))
        1.0
    """
    x, y = x.double(), y.double()
    found = torch.corrcoef(torch.stack([x, y]))[0, 1].abs()
    return 0.0 if found.isnan() else min(float(found), 1.0)


def mutual_information(x: Tensor, y: Tensor) -> float:
    """Compute the mutual information of two labelings divided by the mean of their entropies, in [0, 1].

    Example:
        >>> mutual_information(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([7.0, 7.0, 3.0, 3.0]))
        1.0
    """
    # torchmetrics counts in a sparse table, for which torch warns where nobody has said whether it shall be checked.
    with torch.sparse.check_sparse_tensor_invariants():
        found = float(normalized_mutual_info_score(x.long(), y.long()))
    return min(max(found, 0.0), 1.0)


def relatedness_factors(similarity: Tensor, power: float) -> Tensor:
    r"""Compute :math:`(1 + r_k)^p`, where r_k is the mean of a task's known similarities to the others; 1 for none.

    Args:
        similarity: ``[K, K]``, in [-1, 1], nan where unknown; the diagonal is ignored.
        power: p.

    Example:
        >>> relatedness_factors(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), power=2.0)
        tensor([2.2500, 2.2500])
    """
    others = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), torch.nan)
    return (1 + others.nanmean(1).nan_to_num(0.0).clamp(-1, 1)) ** power


class Relatedness(Factor):
    r"""Give tasks that are related to the rest a larger learning rate.

    .. math:: f_k = (1 + r_k)^p, \qquad r_k = \frac{1}{K - 1} \sum_{j \ne k} s_{kj}

    A task that has nothing to do with the others keeps the factor 1; one that agrees with all has :math:`2^p`; one
    whose gradients are opposed to all others has 0. ``measure`` decides what the similarity s is:

    - ``"gradient_cosine"``: the cosine between the gradients of the shared parameters, as a running mean. It needs a
      weighting that measures the Gramian, and moves in the steps in which that one does.
    - ``"target_correlation"``: the absolute value of Pearson's correlation of the targets. For regressions and two
      classes.
    - ``"target_mutual_information"``: normalized mutual information of the targets, for classes, by torchmetrics.
    - ``"prediction_mutual_information"``: the same of the predicted classes: the largest along dimension 1; of one
      number a sample, whether it is above a half where all are within [0, 1], and above 0 otherwise.

    Targets and predictions are taken from the training batches of all ranks and compared where both tasks have one: the
    first ``samples`` targets, measured once there are so many, and at each epoch's end before; the newest ``samples``
    predictions, measured at each epoch's end. They must belong to the same samples, in the same order: batches of
    ``(inputs, {task: target})``. Of dense targets each element counts as a sample, and at most ``samples`` of a batch
    are taken, evenly spread.

    Args:
        measure: What relates the tasks, as above.
        power: p.
        decay: How much of the cosines' running mean stays in each measured step.
        samples: How many targets or predictions are compared. Mutual information of few samples with many classes
            comes out too large for all pairs.

    Raises:
        ValueError: If an argument is out of its range; at setup if nothing measures the Gramian that the cosines need,
            or if there is one task alone; in training if a batch's targets are not those of the same samples, or are no
            classes where information is measured.

    Source: Strehl and Ghosh, Cluster Ensembles, JMLR 2002, for mutual information over a mean of entropies, here the
    arithmetic one.

    Example:
        >>> factor = Relatedness("gradient_cosine", decay=0.0)
        >>> factor.reset(["a", "b", "c"])
        >>> gramian = torch.tensor([[1.0, 1.0, -1.0], [1.0, 4.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
        >>> factor.update(Signals(("a", "b", "c"), torch.ones(3), step=0, epoch=0, gramian=gramian))
        >>> factor.values()
        tensor([0.7500, 1.2500, 0.5000])
    """

    def __init__(
        self, measure: RelatednessMeasure, *, power: float = 1.0, decay: float = 0.9, samples: int = 4096
    ) -> None:
        super().__init__()
        if measure not in get_args(RelatednessMeasure):
            raise ValueError(f"Relatedness(measure={measure!r}) must be one of {list(get_args(RelatednessMeasure))}.")
        if not 0 <= power <= 10:
            raise ValueError(f"Relatedness(power={power}) must be between 0 and 10.")
        if not 0 <= decay < 1:
            raise ValueError(f"Relatedness(decay={decay}) must be at least 0 and below 1.")
        if samples < 2:
            raise ValueError(f"Relatedness(samples={samples}) must be at least 2.")
        self.measure, self.power, self.decay, self.samples = measure, power, decay, samples
        self.add_state("similarity", torch.tensor(torch.nan), per_pair=True, on_cpu=True)
        self.similarity: Tensor
        self.seen: Tensor
        self.taken: Tensor
        if measure != "gradient_cosine":
            # On the CPU, float64: what they are compared with is there, too.
            missing = torch.full((samples,), torch.nan, dtype=torch.float64)
            self._declare("seen", Declared(missing, task_dims=1, on_cpu=True))
            self._declare("taken", Declared(torch.tensor(0), task_dims=0, on_cpu=True))

    def check(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:
        """Refuse cosines that nothing measures, and a task without others."""
        if len(pl_module.tasks) < 2:
            raise ValueError("Relatedness compares tasks, and the module has one; leave it out.")
        weighting = weighting_of(trainer)
        if self.measure == "gradient_cosine" and (weighting is None or weighting.measures != "gramian"):
            found = "without a weighting" if weighting is None else f"with {type(weighting).__name__}"
            raise ValueError(
                f"Relatedness('gradient_cosine') reads the Gramian of the shared gradients, which nothing measures "
                f"{found}; add a weighting that does, such as MGDA or PCGrad, or relate the tasks by their targets."
            )

    @property
    def _what(self) -> Collected:
        return "predictions" if self.measure == "prediction_mutual_information" else "targets"

    @property
    def collects(self) -> Mapping[Collected, int]:
        """Return ``"targets"`` until there are enough of them, or ``"predictions"``."""
        if self.measure == "gradient_cosine" or (self._what == "targets" and int(self.taken) >= self.samples):
            return {}
        return {self._what: self.samples}

    def values(self) -> Tensor:
        """Compute the factors from the similarities known so far."""
        return relatedness_factors(self.similarity, self.power)

    def update(self, signals: Signals) -> None:
        """Read the cosines, where the step measured the Gramian."""
        if self.measure == "gradient_cosine" and signals.gramian is not None:
            self.similarity = moved(self.similarity, cosines(signals.gramian), self.decay)

    def update_samples(self, what: Collected, values: Tensor) -> None:
        """Keep the samples: the first ones of the targets, the newest ones of the predictions."""
        # A ring: predictions go on at its beginning when it is full, targets stop there.
        newest, taken = values.cpu().to(self.seen), int(self.taken)  # MPS has no float64 to convert to
        newest = newest[:, : self.samples - taken] if what == "targets" else newest[:, -self.samples :]
        places = (taken + torch.arange(newest.shape[1])) % self.samples
        self.seen[:, places] = newest
        self.taken = self.taken + newest.shape[1]
        if what == "targets" and int(self.taken) >= self.samples:
            self._compare()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the samples seen so far."""
        if self.collects:
            self._compare()

    def _compare(self) -> None:
        compare: Callable[[Tensor, Tensor], float] = correlation
        if self.measure != "target_correlation":
            compare = mutual_information
            self._check_classes()
        labeled = ~self.seen.isnan()
        similarity = self.similarity.clone()
        for i in range(len(self.tasks)):
            for j in range(i):
                both = labeled[i] & labeled[j]
                if int(both.sum()) > 1:
                    similarity[i, j] = similarity[j, i] = compare(self.seen[i, both], self.seen[j, both])
        self.similarity = similarity

    def _check_classes(self) -> None:
        whole = self.seen.isnan() | (self.seen == self.seen.round())
        for task, are_classes in zip(self.tasks, whole.all(1).tolist(), strict=True):
            if not are_classes:
                raise ValueError(
                    f"Relatedness({self.measure!r}) compares classes, and the targets of task {task!r} are no whole "
                    "numbers; use Relatedness('target_correlation')."
                )
