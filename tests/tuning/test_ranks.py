"""Trials on two processes over gloo: rank 0 draws, both train, both end a pruned trial."""

from __future__ import annotations

import socket
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from tests.distributed.pairs import run_together
from tests.tuning.tiny import SPACE, configuration


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_the_trials_that_rank_0_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured = configuration(tmp_path, devices=2, strategy="ddp", max_epochs=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configured))
    parameters = {"model.optimizer.lr": [1e-1, 1e-7]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**SPACE, "parameters": parameters}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("TORCHELASTIC_RUN_ID", "tuning")):
        monkeypatch.setenv(name, value)
    storage = f"sqlite:///{tmp_path}/study.db"
    command = ["-m", "tests.tuning.rank", str(tmp_path), storage]
    run_together([[*command, str(rank)] for rank in range(2)], tmp_path, seconds=240)
    study = optuna.load_study(storage=storage, study_name="search")
    states = [trial.state for trial in study.trials]
    assert len(states) == 7
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(len(trial.intermediate_values) == 3 for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert all(trial.params["model.optimizer.lr"] == 1e-7 for trial in study.trials if trial.state == TrialState.PRUNED)
    assert (tmp_path / "out" / "best.yaml").exists()
