"""Killed at any step and resumed from the last checkpoint: to the bit what the uninterrupted training does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import ROOT
from tests.interruption.training import CASES, SAVE_EVERY, TASKS, Outcome, module, train
from tests.small import batch
from tests.training import flat_parameters, loader, quiet_trainer

pytestmark = [
    pytest.mark.slow,
    # torchdata's loader calls what torch has deprecated: nothing of ours.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # Of resuming in the same folder.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # Lightning's remark on every save in manual optimization.
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trainings that were killed left their checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-m", "tests.interruption.training", str(folder)],
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    return folder


def last(folder: Path) -> Path:
    return max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted(name: str, killed: Path, tmp_path: Path) -> None:
    found = last(killed / name)
    assert found.stem == f"step={CASES[name].killed_in // SAVE_EVERY * SAVE_EVERY}"
    torch.load(found, weights_only=True)

    whole = train(name, tmp_path / "whole", seed=0)
    resumed = train(name, killed / name, seed=99, ckpt=found)

    assert torch.equal(flat_parameters(resumed.module), flat_parameters(whole.module))
    assert resumed.state.keys() == whole.state.keys()
    for key, state in whole.state.items():
        torch.testing.assert_close(resumed.state[key], state, rtol=0, atol=0, equal_nan=True)
    logged, expected = steps_of(resumed), steps_of(whole)
    first = min(logged)
    assert first <= CASES[name].killed_in
    assert logged == {step: line for step, line in expected.items() if step >= first}


def steps_of(outcome: Outcome) -> dict[int, dict[str, float]]:
    """What each step logged: every task's loss and weight among it."""
    found = {step: line for step, line in outcome.logged.lines if "loss/a" in line and "loss_epoch/a" not in line}
    assert all(
        {f"{value}/{task}" for value in ("loss", "weight") for task in TASKS} <= line.keys() for line in found.values()
    )
    return found


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("name", ["GradNorm", "RLW"])
def test_trained_weights_serve_without_any_callback(name: str, killed: Path) -> None:
    inputs, targets = batch(5, 3, TASKS)
    path = last(killed / name)
    by_hand, by_trainer = module(), module()
    by_hand.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    expected = by_hand.eval()(inputs)

    predicted = quiet_trainer().predict(by_trainer, loader((inputs, targets)), ckpt_path=path)

    assert predicted is not None
    for task in TASKS:
        assert torch.equal(predicted[0][task], expected[task])  # type: ignore[call-overload]
    assert not torch.equal(module().eval()(inputs)["a"], expected["a"])
