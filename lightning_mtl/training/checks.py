"""A module refuses here, at construction and before training, what cannot work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.method.base import Weighting, weighting_of
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.names import check_task_names
from lightning_mtl.task.task import Task
from lightning_mtl.training.whole import check_can_be_whole
from lightning_mtl.training.window import Window

REFUSED_STRATEGIES = (FSDPStrategy, DeepSpeedStrategy)

# torch's FSDP2 calls this method wherever it runs; torch 2.6 has it on GPUs only.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def check_arguments(
    trunk: Any,  # noqa: ANN401 - what is checked here
    heads: Any,  # noqa: ANN401
    tasks: Any,  # noqa: ANN401
) -> None:
    """Check the parts of a :class:`~lightning_mtl.MultiTaskModule`."""
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"trunk must be a torch.nn.Module, found {type(trunk).__name__}.")
    for name, mapping, kind in (("heads", heads, nn.Module), ("tasks", tasks, Task)):
        if not isinstance(mapping, Mapping | nn.ModuleDict) or not len(mapping):
            raise TypeError(
                f"{name} must be a mapping {{task: {kind.__name__}}} with an entry or more, found {mapping!r}."
            )
        for task, value in mapping.items():
            if not isinstance(value, kind):
                raise TypeError(f"{name}[{task!r}] must be a {kind.__name__}, found {type(value).__name__}.")
    check_task_names(tasks)
    _check_names_match(heads, tasks)


def _check_names_match(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task]) -> None:
    if missing := [task for task in tasks if task not in heads]:
        raise ValueError(f"The tasks {missing} have no head; the heads are {list(heads)}. Name both alike.")
    if extra := [task for task in heads if task not in tasks]:
        raise ValueError(f"The heads {extra} have no task; the tasks are {list(tasks)}. Name both alike.")


def check_step_arguments(accumulate_grad_batches: object, clip_val: float | None, clip_algorithm: str) -> None:
    """Check what a module says of its steps."""
    if isinstance(accumulate_grad_batches, bool) or not isinstance(accumulate_grad_batches, int):
        raise TypeError(f"accumulate_grad_batches must be an int, found {accumulate_grad_batches!r}.")
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches} must be at least 1.")
    if clip_val is not None and not clip_val > 0:
        raise ValueError(f"gradient_clip_val={clip_val} must be above 0; leave it None for no clipping.")
    if clip_algorithm not in ("norm", "value"):
        raise ValueError(f"gradient_clip_algorithm={clip_algorithm!r} must be 'norm' or 'value'.")


def check_inputs_differ(module: TaskModule) -> None:
    """Refuse, in a training step whose tasks have inputs of their own, to compare their gradients at the features.

    Raises:
        ValueError: If the weighting measures there.
    """
    if module._trainer is None or not module.trainer.training:
        return
    weighting = weighting_of(module.trainer)
    if weighting is None or weighting.measures == "losses" or weighting.at != "features":
        return
    name = type(weighting).__name__
    raise ValueError(
        f"{name}(at='features') compares the tasks' gradients at the trunk's output, but here each task has inputs of "
        "its own: gradients at different features have no common space, and all their inner products are 0. Use "
        f"{name}(at='last_layer') or {name}(at='trunk'), where the parameters are the same for all tasks, or give "
        "batches of common inputs, (inputs, {task: target})."
    )


def check_trainer(module: TaskModule, trainer: pl.Trainer) -> None:
    """Refuse, before training begins, what the module and the Trainer cannot do together."""
    weighting = weighting_of(module.trainer)
    if module.automatic_optimization:
        for name, unset in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
            if getattr(module, name) != unset:
                raise ValueError(
                    f"{name}={getattr(module, name)} is the module's for manual optimization; with "
                    f"automatic_optimization = True give it to the Trainer: Trainer({name}=...)."
                )
    if weighting is not None:
        check_accumulation(weighting, module.micro_batches_a_step)
        if weighting.measures != "losses":
            module.check_place(type(weighting).__name__, weighting.at)
    # Both flatten parameters, or keep gradients in buffers of their own: what is measured would be of no parameter.
    if isinstance(trainer.strategy, REFUSED_STRATEGIES):
        raise ValueError(
            f"{type(trainer.strategy).__name__} keeps gradients where no weighting can reach them; use strategy='ddp', "
            "or FSDP2: ModelParallelStrategy() with fully_shard(...) in configure_model."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_sharded(module, trainer)


def check_trainer_arguments(module: TaskModule, trainer: pl.Trainer) -> None:
    """Refuse what the Trainer does in automatic optimization only, before Lightning does with a sentence of its own."""
    if module.automatic_optimization or trainer.state.fn != TrainerFn.FITTING:
        return
    unset = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None}
    given = {name: getattr(trainer, name) for name, default in unset.items()}
    wrong = {name: value for name, value in given.items() if value != unset[name] and value != 0}
    if wrong:
        named = ", ".join(f"{name}={getattr(value, 'value', value)!r}" for name, value in wrong.items())
        raise ValueError(
            f"Trainer({named}) is not applied, for {type(module).__name__} accumulates and clips by itself: give it to "
            f"the module, {type(module).__name__}(..., {named}), or set automatic_optimization = True."
        )


def check_evaluation_loaders(module: TaskModule, step: str, loaders: Any) -> None:  # noqa: ANN401
    """Refuse several loaders that are no ``{task: loader}``, unless the module has an evaluation step of its own."""
    if not getattr(type(module), step).__module__.startswith(__name__.rpartition(".")[0]):
        return
    if isinstance(loaders, Mapping):
        # A module without a trunk reads batches by itself, under whatever names.
        if len(loaders) > 1 and module.the_trunk is not None and not set(loaders) <= set(module.tasks):
            raise several_loaders()
    elif isinstance(loaders, list | tuple) and len(loaders) > 1:
        raise several_loaders()


def several_loaders() -> ValueError:
    """The refusal of evaluation loaders that have no names."""
    return ValueError(
        "Several evaluation loaders would be averaged into one figure. Give each task its loader, as {task: "
        'loader, ...}, in a MultiTaskDataModule or a CombinedLoader({task: loader, ...}, "max_size"), or '
        "evaluate the loaders one at a time."
    )


def check_accumulation(weighting: Weighting, size: int) -> None:
    """Refuse a method that needs the features of a whole step where they lie in several micro-batches."""
    if weighting.measures == "rows" and weighting.at == "features" and size > 1:
        raise ValueError(
            f"{type(weighting).__name__}(at='features') combines gradients at the features of one batch, and with "
            f"accumulate_grad_batches={size} the features of a step lie in several; measure at 'trunk', or accumulate "
            "nothing."
        )


def collects_shards(weighting: Weighting | None, size: int) -> ValueError:
    """The refusal of an accumulation window whose weights are not known at its first micro-batch."""
    return ValueError(
        f"accumulate_grad_batches={size} with {type(weighting).__name__} keeps each task's gradients until the weights "
        "are known, at the optimizer step's end, and a sharded model (FSDP2) has gradients in a backward pass only. "
        "Accumulate nothing, or give every micro-batch all tasks and use a method that reads nothing but its state, "
        "such as UncertaintyWeighting."
    )


def check_collection(window: Window, shared: Sequence[Tensor], *, sharded: bool) -> None:
    """Refuse a step that has to keep each task's gradients and cannot."""
    if window.wanted != "nothing" and window.measures_at == "trunk" and not (shared or window.idle):
        raise no_shared_parameters(window.weighting)
    if window.weighting is not None and window.size > 1:
        check_accumulation(window.weighting, window.size)
    if sharded and window.size > 1:
        raise collects_shards(window.weighting, window.size)


def check_model(module: TaskModule, trainer: pl.Trainer) -> None:
    """Refuse, once the model is configured, parameters that no rank would average."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    unsharded = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if unsharded:
        parts = "the parts that hold them" if module.the_trunk is None else "the trunk and on each head"
        raise ValueError(
            f"ModelParallelStrategy averages the gradients of sharded parameters only, which {unsharded[0]!r} and "
            f"{len(unsharded) - 1} more are not; call fully_shard on {parts} in configure_model."
        )
    check_can_be_whole(module)
    weighting = weighting_of(module.trainer)
    if (
        module.the_trunk is None
        or weighting is None
        or weighting.measures == "losses"
        or weighting.at != "features"
        or weighting.weighs_heads
    ):
        return
    shared = set(module.shared_parameters())
    if own := [name for name, p in module.the_trunk.named_parameters() if p.requires_grad and p not in shared]:
        raise ValueError(
            f"{type(weighting).__name__}(at='features') gives the trunk one set of weights, in which {own[0]!r} and "
            f"{len(own) - 1} more that no tasks share would have to be weighed as heads are; sharded parameters cannot "
            "be told apart there. Measure at 'trunk', or train with strategy='ddp'."
        )


def _check_sharded(module: TaskModule, trainer: pl.Trainer) -> None:
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError("A gradient scaler does not know sharded gradients; use precision='bf16-mixed' or '32-true'.")
    strategy = trainer.strategy
    if strategy.root_device.type == "cpu" and not FSDP2_ON_CPU:
        raise ValueError(
            f"FSDP2 on the CPU needs torch 2.7 or later, found {torch.__version__}; use strategy='ddp', or GPUs."
        )
    if isinstance(strategy, ModelParallelStrategy) and (parts := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy(tensor_parallel_size={parts}), by default all devices of a node, has {parts} ranks "
            "see the same data; tasks are balanced over data-parallel ranks. Use ModelParallelStrategy("
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )
    weighting = weighting_of(module.trainer)
    if weighting is None or module.the_trunk is None:  # a module without a trunk is whole in its steps
        return
    name, at, size = type(weighting).__name__, weighting.at, module.micro_batches_a_step
    if size > 1 and (weighting.measures != "losses" or weighting.reads_losses):
        raise collects_shards(weighting, size)
    if weighting.kernel_probes or weighting.renews_rows:
        raise ValueError(
            f"{name} differentiates by the shared parameters beside the step's backward pass, in which alone a sharded "
            "model (FSDP2) has gradients; use strategy='ddp'."
        )
    if weighting.measures == "losses":
        return
    if at not in ("trunk", "features"):
        raise ValueError(
            f"{name}(at={at!r}) measures gradients of single layers, which sharded parameters do not give; measure "
            "at 'features' or 'trunk'."
        )
    if at == "trunk" and weighting.measures == "rows":
        raise ValueError(f"{name} needs whole gradients, of which a sharded model has parts; use at='features'.")


def check_split(module: TaskModule, batch: MicroBatch, weighting: Weighting | None) -> None:
    """Refuse a step whose trunk showed no output to measure gradients at.

    Named modules need none: their gradients are those of the losses.
    """
    if weighting is None or weighting.at not in ("features", "last_layer") or set(batch.names) <= set(batch.absent):
        return
    at = weighting.at
    called = f"{type(weighting).__name__}(at={at!r})"
    if isinstance(module.the_trunk, torch.jit.ScriptModule):
        raise ValueError(
            f"{called} has to see what the trunk returns, and a script takes no hook and shows no layers. Measure at "
            "'trunk', or put the script into a module of your own."
        )
    if at == "last_layer":
        return
    if not batch.split.calls:
        raise ValueError(
            f"{called} measures gradients at the trunk's output, but the trunk was not called in this step; call "
            "self(inputs) or self.trunk(inputs) in task_losses, not one of the trunk's parts or its forward(). At "
            "'trunk' gradients of the shared parameters are measured, whatever is called."
        )
    if not batch.split.outputs:
        raise ValueError(
            f"{called} measures gradients at the trunk's output, but nothing the trunk returned requires a gradient; "
            "unfreeze some of it, or weigh by the losses alone. An object of a class of the trunk's own cannot be "
            "looked into: return tensors, or mappings, sequences or dataclasses of them, or measure at 'trunk'."
        )


def no_shared_parameters(weighting: Weighting | None) -> ValueError:
    """The refusal of a step in which there is nothing to balance."""
    return ValueError(
        f"{type(weighting).__name__}(at='trunk') measures gradients of the shared parameters, but none of "
        "them can be trained; unfreeze some, override shared_parameters(), or weigh by the losses alone."
    )


def nothing_shared(weighting: Weighting | None, tasks: Sequence[str]) -> ValueError:
    """The refusal of tasks whose graphs have no parameter in common."""
    return ValueError(
        f"{type(weighting).__name__}(at='trunk') measures gradients of the shared parameters, but no parameter that "
        f"trains is reached by the losses of two of the tasks {list(tasks)}: unfreeze some, name modules with "
        "at=[...], or weigh by the losses alone."
    )


def nothing_trains(tasks: Sequence[str]) -> ValueError:
    """The refusal of losses that no parameter changes."""
    return ValueError(
        f"No loss of the tasks {list(tasks)} depends on a parameter that trains: in this batch their losses are "
        "constants, or everything is frozen. Unfreeze some of the model, do not detach the losses, and leave a task "
        "without labels out of what task_losses returns; a batch without any task is passed over."
    )
