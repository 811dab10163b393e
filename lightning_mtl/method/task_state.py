"""State of a callback for each task is declared once, then saved, restored, moved and cut to the present tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_mtl.devices import numbers
from lightning_mtl.method.arguments import GivenArguments
from lightning_mtl.method.signals import Signals


class Declared(NamedTuple):
    """A state's value at the start of training, how many of its dimensions are tasks, and whether it stays put."""

    default: Tensor
    task_dims: int
    on_cpu: bool = False


class TaskState(GivenArguments, Callback):
    """The part of a weighting that remembers."""

    key_prefix: ClassVar[str] = "lightning_mtl.Weighting:"
    """How the keys of such callbacks begin in a checkpoint, where they find each other's states by it."""
    state_key: str = ""
    """The key of the state in a checkpoint. Lightning asks for it in each hook of each step: no property."""
    takes_any_checkpoint: ClassVar[bool] = False
    """Whether a checkpoint may lack this callback's state, which then begins anew."""

    def __init_subclass__(cls, **arguments: Any) -> None:  # noqa: ANN401 - what a class statement may hold
        """Give the class its key."""
        super().__init_subclass__(**arguments)
        cls.state_key = f"{cls.key_prefix}{cls.__name__}"

    def __init__(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self._states: dict[str, Declared] = {}

    def add_state(
        self, name: str, default: Tensor, *, per_task: bool = True, per_pair: bool = False, on_cpu: bool = False
    ) -> None:
        """Declare what the method remembers; read and write it as the attribute ``name``.

        It is saved and restored with checkpoints, moved to the module's device, and, where it belongs to tasks, cut to
        the tasks present in a step while :meth:`weigh` and :meth:`update` run.

        Args:
            name: The attribute.
            default: The value at the start of training; for a state with ``per_task``, of one task, so that the
                attribute has shape ``[K, *default.shape]``.
            per_task: Whether the state belongs to the tasks or to the method as a whole.
            per_pair: Whether it belongs to pairs of tasks, so that the attribute has shape ``[K, K, *default.shape]``.
            on_cpu: Whether it stays on the CPU, where Gramians are.
        """
        self._declare(name, Declared(default, 2 if per_pair else int(per_task), on_cpu))

    def add_generator(self, name: str, seed: int) -> None:
        """Declare a source of random numbers, the same on every rank, that resumes where it was interrupted.

        The attribute ``name`` is a generator's state, on the CPU. Draw from what :meth:`random_numbers` returns, and
        call :meth:`advance` in :meth:`update`.

        Args:
            name: The attribute.
            seed: Where the numbers begin.
        """
        self._declare(name, Declared(torch.Generator().manual_seed(seed).get_state(), task_dims=0, on_cpu=True))

    def random_numbers(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The generator of one step: it begins with the same numbers until :meth:`advance` is called."""
        # A seed for each step, so that ranks that draw differently many numbers still agree on the next step's.
        seed = torch.randint(2**62, (), generator=self._generator(name))
        return torch.Generator(device).manual_seed(int(seed))

    def advance(self, name: str) -> None:
        """Go on to the random numbers of the next step."""
        generator = self._generator(name)
        torch.randint(2**62, (), generator=generator)
        setattr(self, name, generator.get_state())

    def _generator(self, name: str) -> torch.Generator:
        generator = torch.Generator()
        generator.set_state(getattr(self, name))
        return generator

    def _declare(self, name: str, declared: Declared) -> None:
        if name in self._states or hasattr(type(self), name):
            raise ValueError(f"{type(self).__name__} cannot declare the state {name!r}: the name is taken.")
        self._states[name] = declared
        setattr(self, name, declared.default)

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Begin anew, for these tasks."""
        self.tasks = tuple(tasks)
        for name, (default, task_dims, on_cpu) in self._states.items():
            value = default.expand((len(tasks),) * task_dims + default.shape)
            setattr(self, name, value.clone().to("cpu" if on_cpu else device))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the state to the module's device."""
        for name, declared in self._states.items():
            setattr(self, name, getattr(self, name).to("cpu" if declared.on_cpu else pl_module.device))

    def of_tasks(self, given: Mapping[str, float], otherwise: float, signals: Signals, like: Tensor) -> Tensor:
        """Return the numbers that a user gave the present tasks, ``[K]``, where another tensor is, and of its dtype."""
        return numbers([given.get(task, otherwise) for task in signals.tasks], like.device, like.dtype)

    @contextmanager
    def only(self, present: Sequence[int]) -> Iterator[None]:
        """Cut the tasks' states to the present ones, and put what became of them back."""
        if len(present) == len(self.tasks):
            yield
            return
        whole = {name: getattr(self, name) for name, declared in self._states.items() if declared.task_dims}
        places = {device: numbers(present, device, torch.long) for device in {value.device for value in whole.values()}}
        cut = {name: _grid(places[value.device], self._states[name].task_dims) for name, value in whole.items()}
        for name, value in whole.items():
            setattr(self, name, value[cut[name]])
        try:
            yield
        finally:
            for name, value in whole.items():
                part = getattr(self, name)  # a method may have made it wider: on ranks losses are float64
                setattr(self, name, value.to(part.dtype).index_put(cut[name], part))

    # Checkpoints.

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint that another method has written.

        Raises:
            ValueError: Naming both methods.
        """
        prefix, name = self.key_prefix, type(self).__name__
        written = [key.removeprefix(prefix) for key in checkpoint.get("callbacks", {}) if key.startswith(prefix)]
        is_child = all(callback is not self for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if written and name not in written and not (is_child or self.takes_any_checkpoint):
            raise self._written_by(written[0])

    def _written_by(self, other: str) -> ValueError:
        name = type(self).__name__
        return ValueError(
            f"The checkpoint was written with {other}, the Trainer holds {name}; "
            f"resume with {other}, or load the model's weights alone to go on with {name}."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the method's name, the tasks' names, the declared states."""
        return {
            "weighting": type(self).__name__,
            "tasks": list(self.tasks),
            "state": {name: getattr(self, name).detach().clone() for name in self._states},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is another method's, of other tasks, or of other arguments.
        """
        name = type(self).__name__
        if state_dict["weighting"] != name:
            raise self._written_by(state_dict["weighting"])
        if self.tasks and state_dict["tasks"] != list(self.tasks):
            raise ValueError(
                f"The checkpoint's {name} balanced the tasks {state_dict['tasks']}, the module has {list(self.tasks)}; "
                "resume with the same tasks, or load the model's weights alone."
            )
        if state_dict["state"].keys() != self._states.keys():
            raise ValueError(
                f"The checkpoint's {name} holds the states {sorted(state_dict['state'])}, this one has "
                f"{sorted(self._states)}; construct it with the arguments of the interrupted run."
            )
        self.tasks = tuple(state_dict["tasks"])
        for key, value in state_dict["state"].items():
            setattr(self, key, value.to(getattr(self, key).device))


def _grid(index: Tensor, task_dims: int) -> tuple[Tensor, ...]:
    """Indices that cut the present tasks out of that many leading dimensions."""
    return (index,) if task_dims == 1 else (index[:, None], index)
