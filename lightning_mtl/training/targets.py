"""The training data's targets are read once before a fit, for tasks that standardize them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_mtl.devices import widest
from lightning_mtl.distributed import of_each, sum_over
from lightning_mtl.task.batches import is_joint, is_per_task
from lightning_mtl.task.labels import labeled_part
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.units import Units, final_layer


def measure_targets(module: TaskModule, trainer: pl.Trainer) -> None:
    """Compute the mean and standard deviation of targets that a task standardizes, where they are not known yet.

    One pass over the training data, as each rank has them; the random numbers are put back.

    Raises:
        ValueError: If the targets cannot be read, or have no spread.
    """
    wanted = [task for task in module.target_units if not (units := _units(module, task)).known and not units.running]
    if not wanted:
        return
    _check_losses(module, wanted)
    loop = trainer.fit_loop
    early = loop._combined_loader is None  # in the sanity check
    loop.setup_data()
    found = {task: _Moments() for task in wanted}
    with isolate_rng():
        for name, loader in _loaders(trainer.train_dataloader):
            for batch in one_pass(loader, wanted):
                for task, target in _targets_in(batch, module, name).items():
                    if task in found:
                        found[task].add(_labels(module, task, target))
    if early:
        # Lightning asks again, as it would have: it draws random numbers then, and puts those of a sanity check back.
        loop._combined_loader = None
    gathered = of_each({task: moments.values for task, moments in found.items()})
    for task in wanted:
        moments = _Moments()
        for of_rank in gathered:
            moments.merge(*of_rank[task])
        count, mean, squares = moments.values
        if not count:
            raise _unreadable([task], "no label was found in data that can be read twice; or use standardize='running'")
        std = (squares / count) ** 0.5
        if not 0 < std < float("inf"):
            raise ValueError(
                f"Task(standardize=True) of task {task!r} found {int(count)} labels with the standard deviation {std} "
                "in the training data, and cannot divide by that; give standardize=(mean, std), or leave it out."
            )
        _units(module, task).set(*(torch.tensor(value, dtype=torch.float64) for value in (mean, std)))


@torch.no_grad()
def follow_targets(module: TaskModule, trainer: pl.Trainer, batch: Any) -> None:  # noqa: ANN401
    """Move running statistics by the targets of a step's first batch, before the step: over all ranks, in one sum."""
    running = [task for task in module.target_units if _units(module, task).running]
    if not running:
        return
    _check_losses(module, running)
    sums = torch.zeros(len(running), 3, dtype=widest(module.device), device=module.device)
    for task, target in _targets_in(batch, module, None).items():
        if task in running:
            labels = _labels(module, task, target).to(sums)
            sums[running.index(task)] = torch.stack(
                [labels.new_full((), labels.numel()), labels.sum(), labels.square().sum()]
            )
    for task, own in zip(running, sum_over(trainer, sums).unbind(), strict=True):
        if isinstance(final_layer(task, module.the_heads[task]).weight, DTensor):
            raise ValueError(
                f"Task(standardize='running') of task {task!r} corrects a layer of its head, which is sharded (FSDP2); "
                "give standardize=(mean, std)."
            )
        _units(module, task).follow(own, module.the_heads[task])


def _units(module: TaskModule, task: str) -> Units:
    return cast("Units", module.target_units[task])


class _Moments:
    """Number, mean and sum of squared deviations, merged batch by batch, as Chan, Golub and LeVeque (1979) do."""

    def __init__(self) -> None:
        self.values = (0.0, 0.0, 0.0)

    def add(self, labels: Tensor) -> None:
        if labels.numel():
            wide = labels.detach().cpu().double()
            mean = wide.mean()
            self.merge(float(wide.numel()), float(mean), float((wide - mean).square().sum()))

    def merge(self, count: float, mean: float, squares: float) -> None:
        if count:
            n, own, own_squares = self.values
            total, apart = n + count, mean - own
            self.values = (total, own + apart * count / total, own_squares + squares + apart**2 * n * count / total)


def _labels(module: TaskModule, task: str, target: Any) -> Tensor:  # noqa: ANN401
    """What of a target is labeled."""
    declared = module.tasks[task]
    labels = labeled_part(target, target, declared.missing, declared.missing_per).target
    _units(module, task).check(labels, labels)
    return torch.as_tensor(labels)


def _check_losses(module: TaskModule, tasks: Sequence[str]) -> None:
    if not module.task_losses.__module__.startswith(__name__.partition(".")[0] + "."):
        raise _unreadable(tasks, f"{type(module).__name__}.task_losses may make other targets of them")


def _targets_in(batch: Any, module: TaskModule, name: str | None) -> dict[str, Any]:  # noqa: ANN401
    if name is not None and name in module.tasks and isinstance(batch, tuple | list) and len(batch) == 2:
        return {name: batch[1]}
    under_a_name = name is not None and name in module.tasks and not is_per_task(batch, module.tasks)
    batch = module.in_known_form({name: batch} if under_a_name else batch)
    if is_joint(batch, module.tasks):
        return {task: target for task, target in batch[1].items() if target is not None}
    if is_per_task(batch, module.tasks):
        return {task: pair[1] for task, pair in batch.items() if pair is not None}
    raise _unreadable(list(module.target_units), f"a batch is of the type {type(batch).__name__}, of a form of its own")


def _unreadable(tasks: Iterable[str], reason: str) -> ValueError:
    return ValueError(
        f"The targets of {list(tasks)} cannot be read to standardize them: {reason}. Give standardize=(mean, std)."
    )


def _loaders(loaders: Any) -> Iterator[tuple[str | None, Any]]:  # noqa: ANN401
    """Each loader, with the name that a Trainer's dict gives it."""
    if isinstance(loaders, Mapping):
        yield from ((str(name), loader) for name, loader in loaders.items())
    elif isinstance(loaders, list | tuple):
        yield from ((None, loader) for loader in loaders)
    else:
        yield None, loaders


def one_pass(loader: Any, tasks: Iterable[str]) -> Iterable[Any]:  # noqa: ANN401
    """The loader's batches, read beside it: neither its order nor its place changes."""
    if callable(of_its_own := getattr(loader, "one_pass", None)):
        return of_its_own()  # type: ignore[no-any-return]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise _unreadable(tasks, f"{kind} can be read but once, as it comes; or use standardize='running'")
    samplers = [sampler for sampler in (loader.sampler, loader.batch_sampler) if sampler is not None]
    with _generators_put_back([loader, *samplers]):
        batches = loader.batch_sampler if loader.batch_sampler is not None else ([index] for index in loader.sampler)
        indices = [index for batch in batches for index in batch]
    if isinstance(sampler := loader.sampler, DistributedSampler):
        # What it adds so that all ranks have as many.
        indices = indices[: len(range(sampler.rank, len(loader.dataset), sampler.num_replicas))]  # type: ignore[arg-type]
    # Without a batch size the dataset makes the batches.
    return DataLoader(
        loader.dataset,
        batch_size=None if loader.batch_sampler is None else loader.batch_size or 64,
        sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


@contextmanager
def _generators_put_back(owners: Iterable[object]) -> Iterator[None]:
    kept = [v for owner in owners for v in vars(owner).values() if isinstance(v, torch.Generator)]
    states = [generator.get_state() for generator in kept]
    try:
        yield
    finally:
        for generator, state in zip(kept, states, strict=True):
            generator.set_state(state)
