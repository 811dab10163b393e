"""Interrupted in the middle of an epoch and resumed: to the bit what the uninterrupted run does."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.weighting import DTP, DWA, MGDA, GradNorm, UncertaintyWeighting
from tests.contract import memory, one_of_each
from tests.contract_rows import ROWS
from tests.contract_shelf import SHELF
from tests.small import Batch, batch, binary, small
from tests.thinning import thinned
from tests.training import Memory, fit, flat_parameters, loader

# torchdata's loader calls what torch has deprecated: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SAMPLES, BATCH, EPOCHS = 16, 4, 4
# In the third epoch, of four batches, between validations.
SAVED_AFTER = 10


class Samples(Dataset[Batch]):
    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.inputs, self.targets = batch(SAMPLES, 11, tasks)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


class Randomness(pl.Callback):
    """Carries torch's random state over an interruption: the next epoch's order is drawn from it."""

    state: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["state"]

    def on_train_start(self, *_: Any) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state)


class Saving(pl.Callback):
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.fit_loop.total_batch_idx + 1 == SAVED_AFTER:
            trainer.save_checkpoint(self.path)


TASKS = ("a", "b", "c")


def train(
    weighting: Weighting | None, *, save: Path | None = None, ckpt: Path | None = None, seed: int = 0, **arguments: Any
) -> tuple[MultiTaskModule, Memory, dict[str, Tensor]]:
    """One run; nothing but the checkpoint is carried from one to another."""
    module, logger = binary(tasks=TASKS, optimizer=functools.partial(torch.optim.Adam, lr=0.05), **arguments), Memory()
    torch.manual_seed(seed)
    data: Any = StatefulDataLoader(Samples(TASKS), batch_size=BATCH, shuffle=True)
    callbacks = [Randomness(), Saving(save), *([] if weighting is None else [weighting])]
    val = DataLoader(Samples(TASKS), batch_size=8)
    fit(
        module,
        data,
        val,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
        max_epochs=EPOCHS,
        ckpt_path=ckpt,
    )
    states = {} if weighting is None else weighting.state_dict()["state"]
    return module, logger, states


def assert_resumes(make: Any, path: Path, **arguments: Any) -> None:
    whole, whole_logger, whole_states = train(make(), save=path / "middle.ckpt", **arguments)
    torch.load(path / "middle.ckpt", weights_only=True)
    resumed, rest, states = train(make(), ckpt=path / "middle.ckpt", seed=99, **arguments)
    assert flat_parameters(whole).tolist() == flat_parameters(resumed).tolist()
    assert whole_states.keys() == states.keys()
    for name, state in whole_states.items():
        assert torch.equal(state.nan_to_num(7.0), states[name].nan_to_num(7.0)), name
    first = min(step for step, _ in rest.lines)
    steps = [(step, line) for step, line in whole_logger.lines if step >= first and _of_a_step(line)]
    found = [(step, line) for step, line in rest.lines if _of_a_step(line)]
    assert found == steps
    assert len(found) >= 3
    # The mean losses of the interrupted epoch take up where they were.
    means = [line for _, line in whole_logger.lines if "loss_epoch/a" in line][2:]
    assert [line["loss_epoch/a"] for line in means] == [
        line["loss_epoch/a"] for _, line in rest.lines if "loss_epoch/a" in line
    ]


def _of_a_step(line: dict[str, float]) -> bool:
    return "loss/a" in line and "loss_epoch/a" not in line


OTHERS = [pytest.param(row.make, id=row.label, marks=pytest.mark.slow) for row in SHELF if row.fits]


# SoftOptimalUncertainty's weights on these few, learned batches.
@pytest.mark.filterwarnings("ignore:.* times the median weight of the others")
@pytest.mark.parametrize(
    "make", thinned([*one_of_each((row.make for row in ROWS if row not in SHELF and row.fits), memory), *OTHERS])
)
def test_every_weighting(make: Any, tmp_path: Path) -> None:
    assert_resumes(make, tmp_path)


def test_without_a_weighting(tmp_path: Path) -> None:
    assert_resumes(lambda: None, tmp_path)


@pytest.mark.parametrize("make", [GradNorm, MGDA, UncertaintyWeighting], ids=lambda make: make.__name__)
def test_between_the_windows_of_accumulation(make: Any, tmp_path: Path) -> None:
    # 10 micro-batches: five windows of 2.
    assert_resumes(make, tmp_path, accumulate_grad_batches=2)


def test_a_later_start_counts_from_the_first_training(tmp_path: Path) -> None:
    assert_resumes(functools.partial(GradNorm, start_step=SAVED_AFTER - 3, lr=0.2), tmp_path)
    assert_resumes(functools.partial(MGDA, start_step=SAVED_AFTER + 3), tmp_path)


def checkpoint(path: Path, weighting: Weighting, tasks: tuple[str, ...] = ("a", "b")) -> Path:
    trainer = fit(small(tasks), loader(batch(4, 5, tasks)), callbacks=[weighting])
    trainer.save_checkpoint(path / "run.ckpt")
    return path / "run.ckpt"


# Lightning's own hint, before our error, that the checkpoint's callback is missing.
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_another_weighting_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, GradNorm())
    message = "The checkpoint was written with GradNorm, the Trainer holds DWA; resume with GradNorm"
    with pytest.raises(ValueError, match=message):
        fit(small(), loader(batch()), callbacks=[DWA()], ckpt_path=path, max_epochs=2)


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, MGDA())
    message = re.escape("The checkpoint's MGDA holds the states ['zero_gradient_steps'], this one has ['held_weights'")
    with pytest.raises(ValueError, match=message):
        fit(small(), loader(batch()), callbacks=[MGDA(every_n_steps=2)], ckpt_path=path, max_epochs=2)


class Renamed(MultiTaskModule):
    """Takes the parameters of any module with as many heads."""

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(dict(zip(self.state_dict(), state_dict.values(), strict=True)), *args, **kwargs)


@pytest.mark.parametrize("tasks", [("a", "c"), ("b", "a")])
def test_other_tasks_are_refused(tasks: tuple[str, ...], tmp_path: Path) -> None:
    path = checkpoint(tmp_path, UncertaintyWeighting())
    module = small(tasks, cls=Renamed)
    message = re.escape(f"UncertaintyWeighting balanced the tasks ['a', 'b'], the module has {list(tasks)}")
    with pytest.raises(ValueError, match=message):
        fit(
            module,
            loader(batch(4, 5, tasks)),
            callbacks=[UncertaintyWeighting()],
            ckpt_path=path,
            max_epochs=2,
        )


def test_a_checkpoint_with_a_weighting_serves_without_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, GradNorm())
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):
        trainer = fit(small(), loader(batch()), ckpt_path=path, max_epochs=2)
    assert trainer.global_step == 2


def test_the_performance_of_the_last_validation_is_kept(tmp_path: Path) -> None:
    weighting = DTP("accuracy", alpha=0.5)
    trainer = fit(binary(), loader(batch()), loader(batch()), callbacks=[weighting])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = DTP("accuracy", alpha=0.5)
    fit(binary(), loader(batch()), loader(batch()), callbacks=[resumed], ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(resumed.performance, weighting.performance)
    assert not resumed.performance.isnan().any()
