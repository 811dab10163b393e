"""Worker processes end with the Trainer's function that needed them, and leave the state behind."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl.data import Joint, MultiTaskDataModule
from tests.loaders.samples import Flowing, Numbered, Sample, Watch, module, sample
from tests.training import quiet_trainer

# torchdata's loader calls what torch has deprecated: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Own(DataLoader[Sample]):
    """A loader that is used as it is."""


def persisting() -> Own:
    return Own(Numbered(9), batch_size=2, num_workers=1, persistent_workers=True)


DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "datasets": lambda: {"a": Numbered(9), "b": Numbered(5)},
    "iterables": lambda: {"a": Flowing(9), "b": Flowing(5)},
    "own loaders": lambda: {"a": persisting(), "b": StatefulDataLoader(Numbered(5), batch_size=2, num_workers=1)},
}


def data(name: str, **arguments: Any) -> MultiTaskDataModule:
    settings: dict[str, Any] = {
        "num_workers": 1,
        "shard_iterables": True,
        "persistent_workers": True,
        "steps_per_epoch": 3,
    }
    return MultiTaskDataModule(DATA[name](), DATA[name](), mixing=Joint(), batch_size=2, **(settings | arguments))


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """No garbage collection ends what should have ended before."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Workers(Watch):
    """Counts the processes during training, and keeps the state of the data after the last batch."""

    most = 0
    state: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.most = max(self.most, len(multiprocessing.active_children()))
        self.state = trainer.datamodule.state_dict()


@pytest.mark.parametrize("name", DATA)
def test_no_worker_outlives_a_fit(name: str) -> None:
    made = data(name)
    trainer = quiet_trainer(callbacks=[during := Workers()], max_epochs=2, limit_val_batches=2)
    trainer.fit(module(("a", "b")), datamodule=made)
    assert during.most > 0
    assert not multiprocessing.active_children()
    for stage in (trainer.validate, trainer.fit):  # with the same loaders
        stage(module(("a", "b")), datamodule=made)
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", DATA)
def test_the_state_remains(name: str) -> None:
    trainer = quiet_trainer(callbacks=[watch := Workers()])
    trainer.fit(module(("a", "b")), datamodule=(made := data(name)))
    assert made.state_dict() == watch.state


class Broken(Numbered):
    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            raise ZeroDivisionError
        return sample(index)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_no_worker_outlives_an_error(stage: str) -> None:
    broken = {"a": Numbered(9), "b": Broken(4)}
    made = MultiTaskDataModule(broken, broken, batch_size=2, num_workers=1, persistent_workers=True)
    with pytest.raises(ZeroDivisionError):
        getattr(quiet_trainer(), stage)(module(("a", "b")), datamodule=made)
    assert not multiprocessing.active_children()
