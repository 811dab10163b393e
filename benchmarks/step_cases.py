"""The models, batches and fits whose steps ``step_time.py`` and others time."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import DWA, MGDA, GradNorm, UncertaintyWeighting

CLASSES = 10
WARM_UP = 3
LEARNING_RATE = 1e-6  # nothing is to be learned from one batch: losses and gradients stay what they are at the start


def mlp() -> nn.Sequential:
    widths = [784, 512, 512, 256]
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())))


def conv() -> nn.Sequential:
    channels = [3, 16, 32, 64]
    pairs = itertools.pairwise(channels)
    blocks = [
        layer for pair in pairs for layer in (nn.Conv2d(*pair, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten())


@dataclass(frozen=True)
class Trunk:
    make: Callable[[], nn.Sequential]
    inputs: tuple[int, ...]  # batch first
    last_layer: int  # its index in the Sequential
    to_reach: float  # with gradients at the trunk, as a multiple of the cost of rows


TRUNKS = {"mlp": Trunk(mlp, (128, 784), 4, 1.40), "conv": Trunk(conv, (64, 3, 32, 32), 6, 1.10)}

Batch = Any  # (inputs, {task: target}), or points
Heads = dict[str, nn.Module]
Device = Literal["cpu", "cuda"]
Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed"]


def clock(device: str) -> float:
    """Processor time, which what else runs disturbs less than the wall's; on a GPU the wall's, its work done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Repeated:
    """A loader that costs nothing: the same batch again and again."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch, self.times)


class Plain(pl.LightningModule):
    """What one would write without the package: automatic optimization of the summed loss, nothing logged."""

    def __init__(self, trunk: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        features = self.trunk(inputs)
        return torch.stack([cross_entropy(head(features), targets[task]) for task, head in self.heads.items()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


class StepClock(pl.Callback):
    """Notes when each step begins; from one beginning to the next lies everything that a step costs."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.begun: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        self.begun.append(clock(self.device))


@dataclass(frozen=True)
class Times:
    """Seconds of a step in one round: an ordinary one, and one whose scalars are written, where any are."""

    ordinary: float
    logged: float


@dataclass
class Case:
    """A trunk with K heads, a batch for them, and everything that is timed on it."""

    trunk: str
    num_tasks: int
    steps: int  # timed in a round
    log_dir: str
    models: Mapping[str, Trunk] = field(default_factory=lambda: TRUNKS)
    batch_size: int | None = None  # the trunk's own, if not given
    device: Device = "cpu"
    precision: Precision = "32-true"
    keeps_modules: bool = True  # from round to round; else only one of them is in memory at a time
    times: dict[str, list[Times]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        own, *shape = self.models[self.trunk].inputs
        size = own if self.batch_size is None else self.batch_size
        self.tasks = [f"task_{k}" for k in range(self.num_tasks)]
        self.batch: Batch = (
            torch.randn(size, *shape).to(self.device),
            {k: torch.randint(CLASSES, (size,)).to(self.device) for k in self.tasks},
        )
        self._modules: dict[str, pl.LightningModule] = {}

    def parts(self) -> tuple[nn.Sequential, Heads]:
        torch.manual_seed(0)
        trunk = self.models[self.trunk].make()
        width = trunk(self.batch[0][:1].cpu()).shape[1]
        return trunk, {task: nn.Linear(width, CLASSES) for task in self.tasks}

    def module(self, *, plain: bool = False, metrics: bool = False) -> pl.LightningModule:
        trunk, heads = self.parts()
        if plain:
            return Plain(trunk, heads)
        accuracy = MulticlassAccuracy(CLASSES) if metrics else None
        return MultiTaskModule(
            trunk,
            heads,
            {task: Task(cross_entropy, accuracy) for task in self.tasks},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LEARNING_RATE),
        )

    def fit(self, module: pl.LightningModule, weighting: Weighting | None, *, logger: bool, steps: int) -> list[float]:
        """Train for so many steps; the last timed one writes its scalars. Returns each step's seconds."""
        steps_begin = StepClock(self.device)
        trainer = pl.Trainer(
            accelerator=self.device,
            devices=1,
            precision=self.precision,
            max_epochs=1,
            logger=TensorBoardLogger(self.log_dir) if logger else False,
            log_every_n_steps=steps,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[steps_begin] if weighting is None else [steps_begin, weighting],
        )
        # One step more than is timed: the last one runs into the end of the epoch.
        trainer.fit(module, Repeated(self.batch, steps + 1))
        return [after - before for before, after in itertools.pairwise(steps_begin.begun)]

    def made(self, variant: Variant) -> pl.LightningModule:
        if variant.make is not None:
            return variant.make(*self.parts())
        return self.module(plain=variant.plain, metrics=variant.metrics)

    def time_round(self, variant: Variant) -> None:
        module = self._modules.pop(variant.name, None) or self.made(variant)
        if self.keeps_modules:
            self._modules[variant.name] = module
        weighting = None if variant.weighting is None else variant.weighting()
        steps = self.fit(module, weighting, logger=variant.logger, steps=WARM_UP + self.steps + 1)[WARM_UP:]
        ordinary = statistics.median(steps[:-1])
        times = Times(ordinary, steps[-1] if variant.logger else ordinary)
        self.times.setdefault(variant.name, []).append(times)

    def time_passes(self) -> None:
        """Time one task's backward pass of the trunk, and one that ends at the weights of its last layer."""
        trunk = self.parts()[0].to(self.device)
        features = trunk(self.batch[0])
        cotangent = torch.randn_like(features)
        last_layer = trunk[self.models[self.trunk].last_layer]
        for name, part in (("trunk backward", trunk), ("layer gradient", last_layer)):
            parameters, seconds = list(part.parameters()), []
            for _ in range(WARM_UP + self.steps):
                begun = clock(self.device)
                torch.autograd.grad(features, parameters, cotangent, retain_graph=True)
                seconds.append(clock(self.device) - begun)
            middle = statistics.median(seconds[WARM_UP:])
            self.times.setdefault(name, []).append(Times(middle, middle))

    def peak(self, module: pl.LightningModule, weighting: Weighting | None) -> int:
        """The most bytes that tensors held at once over a few steps, the model's own included."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.fit(module, weighting, logger=True, steps=3)
            return torch.cuda.max_memory_allocated()
        gc.collect()  # an earlier module that is freed meanwhile would count against what is held
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.fit(module, weighting, logger=True, steps=3)
        assert profile.profiler is not None  # noqa: S101 - for mypy
        assert profile.profiler.kineto_results is not None  # noqa: S101 - for mypy
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    def extra_numbers_per_parameter(self) -> float:
        """How many numbers gradients at the trunk hold beyond plain training, as a multiple of P."""
        module = self.module()
        extra = self.peak(module, MGDA(at="trunk")) - self.peak(self.module(plain=True), None)
        assert isinstance(module, MultiTaskModule)  # noqa: S101 - for mypy
        return extra / 4 / sum(parameter.numel() for parameter in module.shared_parameters())


@dataclass(frozen=True)
class Variant:
    name: str
    weighting: Callable[[], Weighting] | None = None
    plain: bool = False
    metrics: bool = False
    logger: bool = True
    make: Callable[[nn.Module, Heads], pl.LightningModule] | None = None  # a module that is not ours


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain", plain=True),
        Variant("equal weights"),
        Variant("UncertaintyWeighting", UncertaintyWeighting),
        Variant("DWA", DWA),
        Variant("MGDA features", lambda: MGDA(at="features")),
        Variant("GradNorm last_layer", GradNorm),
        Variant("MGDA trunk", MGDA),
        Variant("task metrics", UncertaintyWeighting, metrics=True),
        Variant("no logger", UncertaintyWeighting, logger=False),
    )
}
