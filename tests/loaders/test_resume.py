"""Interrupted anywhere and resumed from the checkpoint: the batches of the uninterrupted run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl.data import Joint, MultiTaskDataModule, Proportional, Ratios, RoundRobin, Schedule
from tests.loaders.samples import (
    Flowing,
    Make,
    Numbered,
    Remembering,
    SaveAtEpochEnd,
    Sized,
    Watch,
    counted,
    module,
    sample,
    train,
)
from tests.training import flat_parameters, quiet_trainer

pytestmark = [
    # torchdata's loader calls what torch has deprecated: nothing of ours.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # The callback that saves is not there when a run is resumed.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

TASKS = ("a", "b", "c")
EPOCHS = 3


def made(mixing: Any = None, **arguments: Any) -> MultiTaskDataModule:
    train_data = {"a": Numbered(21), "b": Numbered(8), "c": Numbered(3)}
    return MultiTaskDataModule(**({"train": train_data, "batch_size": 4, "mixing": mixing} | arguments))


MODES = [
    Joint(),
    Joint("shortest"),
    RoundRobin(),
    Proportional(temperature=2),
    Ratios({"a": 1, "b": 2, "c": 1}),
    Schedule({0: Joint(), 1: Proportional(), 2: RoundRobin()}),
]


def assert_resumes(make: Make, path: Path, save_after: int, **arguments: Any) -> None:
    whole = Watch(save_after, path / "middle.ckpt")
    train(make(), tasks=TASKS, max_epochs=EPOCHS, callbacks=[whole], **arguments)
    torch.load(path / "middle.ckpt", weights_only=True)
    torch.manual_seed(99)  # what the interrupted process had is gone
    resumed = train(make(), tasks=TASKS, max_epochs=EPOCHS, ckpt=path / "middle.ckpt", **arguments)
    assert resumed.steps == whole.steps[save_after:]
    assert resumed.steps or save_after == len(whole.steps)


@pytest.mark.parametrize("mixing", MODES, ids=repr)
def test_in_every_mode(mixing: Any, tmp_path: Path) -> None:
    make = functools.partial(made, mixing, steps_per_epoch=5)
    for save_after in (1, 4, 5, 7, 10, 13):
        assert_resumes(make, tmp_path, save_after)


@pytest.mark.parametrize("save_after", [2, 6, 9])
def test_after_a_validation_in_the_midst_of_an_epoch(save_after: int, tmp_path: Path) -> None:
    make = functools.partial(made, val={"b": Numbered(9)})
    assert_resumes(make, tmp_path, save_after, val_check_interval=2, num_sanity_val_steps=1)


@pytest.mark.parametrize("after_validation", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_from_an_epochs_end(epoch: int, after_validation: bool, tmp_path: Path) -> None:
    make = functools.partial(made, Proportional(temperature=3), val={"b": Numbered(9)})
    saving = SaveAtEpochEnd(epoch, tmp_path / "end.ckpt", after_validation=after_validation)
    whole = train(make(), tasks=TASKS, max_epochs=EPOCHS, callbacks=[saving])
    resumed = train(make(), tasks=TASKS, max_epochs=EPOCHS, ckpt=tmp_path / "end.ckpt")
    assert resumed.steps == [step for later in whole.epochs[epoch + 1 :] for step in later]


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    trainer, whole = quiet_trainer(max_epochs=EPOCHS, callbacks=[Watch(7, tmp_path / "middle.ckpt")]), module(TASKS)
    trainer.fit(whole, datamodule=made(Proportional()))
    resumed = module(TASKS)
    quiet_trainer(max_epochs=EPOCHS).fit(resumed, datamodule=made(Proportional()), ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(flat_parameters(resumed), flat_parameters(whole))


@pytest.mark.slow
def test_workers_that_loaded_ahead(tmp_path: Path) -> None:
    """The place is that of what was consumed, not of what had been fetched."""
    make = functools.partial(made, Joint(), num_workers=2)
    for save_after in (2, 7):
        assert_resumes(make, tmp_path, save_after)


def test_the_order_is_that_of_the_checkpoints_seed(tmp_path: Path) -> None:
    whole = Watch(3, tmp_path / "middle.ckpt")
    train(made(seed=4), tasks=TASKS, max_epochs=2, callbacks=[whole])
    resumed = train(made(seed=5), tasks=TASKS, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    assert resumed.steps == whole.steps[3:]


def test_another_batch_size_goes_on_at_the_next_unseen_sample(tmp_path: Path) -> None:
    whole = Watch(2, tmp_path / "middle.ckpt")
    train(made(), tasks=TASKS, callbacks=[whole], max_steps=2)
    rest = made(batch_size=3, steps_per_epoch=6)
    resumed = train(rest, tasks=TASKS, max_epochs=1, ckpt=tmp_path / "middle.ckpt")
    found = counted(whole.steps[:2] + resumed.steps[:4])["a"]
    assert max(found.values()) == 1
    assert sum(found.values()) == 2 * 4 + 4 * 3


class Listed:
    """A loader of the user's own: neither a DataLoader nor stateful."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for number in range(self.batches):
            yield [torch.stack(part) for part in zip(sample(2 * number), sample(2 * number + 1), strict=True)]

    def __len__(self) -> int:
        return self.batches


ITERABLES: dict[str, Callable[[], dict[str, Any]]] = {
    "read again": lambda: {"a": Flowing(9), "b": Sized(6), "c": Numbered(3)},
    "with a state": lambda: {"a": Remembering(9), "b": Remembering(5), "c": Numbered(3)},
    "own loaders": lambda: {"a": Listed(3), "b": StatefulDataLoader(Numbered(9), batch_size=2), "c": Numbered(3)},
    "stateful workers": lambda: {
        "a": StatefulDataLoader(Remembering(9), batch_size=2, num_workers=1),
        "b": DataLoader(Flowing(5), batch_size=2),
        "c": Numbered(3),
    },
}


@pytest.mark.parametrize("kind", ITERABLES)
@pytest.mark.parametrize("save_after", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8))])
def test_iterable_data(kind: str, save_after: int, tmp_path: Path) -> None:
    def make() -> MultiTaskDataModule:
        return MultiTaskDataModule(ITERABLES[kind](), mixing=RoundRobin(), steps_per_epoch=11, batch_size=2)

    assert_resumes(make, tmp_path, save_after)


def test_a_dataset_with_a_state_is_not_read_again(tmp_path: Path) -> None:
    def make() -> tuple[MultiTaskDataModule, Remembering]:
        dataset = Remembering(40)
        return MultiTaskDataModule({"a": dataset}, batch_size=2, steps_per_epoch=8), dataset

    train(make()[0], tasks=["a"], callbacks=[Watch(6, tmp_path / "middle.ckpt")])
    data, dataset = make()
    train(data, tasks=["a"], ckpt=tmp_path / "middle.ckpt")
    assert dataset.read == 2 * 2


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    train(made(), tasks=TASKS, callbacks=[Watch(3, tmp_path / "middle.ckpt")])
    state = torch.load(tmp_path / "middle.ckpt", weights_only=True)["MultiTaskDataModule"]
    other = MultiTaskDataModule({"a": Numbered(3), "z": Numbered(3)})
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"in the midst of the data of \['a', 'b', 'c'\], the training data has"):
        other.train_dataloader()
