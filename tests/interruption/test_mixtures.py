"""Forty mixtures of methods, schedulers and callbacks, killed at any step: resumed, they equal a whole run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import ROOT
from tests.interruption.kinds import assert_same
from tests.interruption.mixtures import MIXTURES, train
from tests.training import flat_parameters

pytestmark = [
    # The resumed run does not know that the step it begins with was saved, and saves it again.
    pytest.mark.filterwarnings("ignore:A checkpoint is written inside optimizer step:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.slow,
    # Of resuming in the same folder, of every save in manual optimization, and of the callback that killed.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training:UserWarning"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    subprocess.run(
        [sys.executable, "-m", "tests.interruption.mixtures", str(folder)], cwd=ROOT, check=True, timeout=300
    )
    return folder


@pytest.mark.parametrize("number", range(MIXTURES))
def test_resumed_is_uninterrupted(number: int, killed: Path, tmp_path: Path) -> None:
    last = max((killed / str(number)).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    torch.load(last, weights_only=True)
    whole, expected = train(number, tmp_path / "whole")
    resumed, found = train(number, tmp_path / "resumed", ckpt=last)
    assert torch.equal(flat_parameters(resumed), flat_parameters(whole))
    assert_same(found, expected, str(number))
