"""Trials on two processes over gloo: rank 0 draws, both train, both end a pruned trial."""

from __future__ import annotations

import socket
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from lightning_mtl.tuning.storage import ERROR
from tests.distributed.pairs import Pair
from tests.tuning.rank import search, search_with_a_fault
from tests.tuning.tiny import configuration


def write(tmp_path: Path, epochs: int) -> dict[str, str]:
    """Write what a search reads; return what torchrun tells each rank."""
    configured = configuration(tmp_path, devices=2, strategy="ddp", max_epochs=epochs)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configured))
    parameters = {"model.optimizer.lr": [1e-1, 1e-7]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"objective": "val/loss/total", "parameters": parameters}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tuning"}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("trials", "prune"), [(2, False), (6, True)])
def test_two_ranks_train_the_trials_that_rank_0_draws(trials: int, prune: bool, tmp_path: Path, pair: Pair) -> None:
    torchrun = write(tmp_path, epochs=3 if prune else 1)
    storage = f"sqlite:///{tmp_path}/study.db"
    pair.run(search, tmp_path, storage, torchrun, trials, prune, meets=False)
    study = optuna.load_study(storage=storage, study_name="search")
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    expected = [complete] * 4 + [pruned, complete] if prune else [complete] * trials
    assert [trial.state for trial in study.trials] == expected
    if prune:
        assert [len(trial.intermediate_values) for trial in study.trials] == [3] * 4 + [1, 3]
    # The same training in all of them, on two ranks: one value.
    assert len({trial.value for trial in study.trials if trial.state == complete}) == 1
    assert (tmp_path / "out" / "best.yaml").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_an_error_on_rank_0_alone_ends_the_trial_on_all_ranks_and_the_next_one_trains(
    tmp_path: Path, pair: Pair
) -> None:
    torchrun = write(tmp_path, epochs=2)
    storage = f"sqlite:///{tmp_path}/study.db"
    pair.run(search_with_a_fault, tmp_path, storage, torchrun, meets=False)
    first, second = optuna.load_study(storage=storage, study_name="search").trials
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert "out of range" in first.user_attrs[ERROR]
    assert (len(first.intermediate_values), len(second.intermediate_values)) == (1, 2)
