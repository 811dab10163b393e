"""Trials on two processes over gloo: rank 0 draws, both train, both end a pruned trial."""

from __future__ import annotations

import socket
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from tests.distributed.pairs import run_together
from tests.tuning.tiny import configuration


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_the_trials_that_rank_0_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured = configuration(tmp_path, devices=2, strategy="ddp", max_epochs=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configured))
    parameters = {"model.optimizer.lr": [1e-1, 1e-7]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"objective": "val/loss", "parameters": parameters}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("TORCHELASTIC_RUN_ID", "tuning")):
        monkeypatch.setenv(name, value)
    storage = f"sqlite:///{tmp_path}/study.db"
    command = ["-m", "tests.tuning.rank", str(tmp_path), storage]
    run_together([[*command, str(rank)] for rank in range(2)], tmp_path, seconds=240)
    study = optuna.load_study(storage=storage, study_name="search")
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    assert [trial.state for trial in study.trials] == [complete] * 4 + [pruned, complete]
    assert [len(trial.intermediate_values) for trial in study.trials] == [3] * 4 + [1, 3]
    # The same training in all of them, on two ranks: one value.
    assert len({trial.value for trial in study.trials if trial.state == complete}) == 1
    assert (tmp_path / "out" / "best.yaml").exists()
