"""Several processes on one study, one of them killed: as many trials as were asked for, none lost, none doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_mtl.tuning import tune, workers
from lightning_mtl.tuning.storage import ERROR, SURPLUS, WORKER, counting, is_surplus, open_storage
from tests.tuning.tiny import HOLD, SPACE, configuration

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
ROOT = Path(__file__).parents[2]
SILENCE = 4


def command(folder: Path, storage: str, *more: str) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(folder)))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    arguments = ["--config", "run.yaml", "--space", "space.yaml", "--storage", storage, "--silence", str(SILENCE)]
    return [sys.executable, "-m", "lightning_mtl.cli", "tune", *arguments, *more]


def start(folder: Path, words: Sequence[str], name: str, **environment: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            list(words), cwd=folder, env=os.environ | paths | environment, stdout=log, stderr=subprocess.STDOUT
        )


def written(folder: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))


def trials_of(storage: str) -> list[FrozenTrial]:
    try:
        return optuna.load_study(storage=open_storage(storage, SILENCE), study_name="search").get_trials()
    except KeyError:
        return []


def run_and_kill(folder: Path, trials: int, workers: int) -> list[FrozenTrial]:
    """Start one worker that stops in its second trial, then the others, kill the first; return all trials."""
    storage = f"sqlite:///{folder}/study.db"
    words = command(folder, storage, "--trials", str(trials))
    processes = [start(folder, words, "killed", **{HOLD: "1"})]
    held: list[FrozenTrial] = []
    try:
        deadline = time.monotonic() + 120
        while not held and time.monotonic() < deadline and processes[0].poll() is None:
            time.sleep(0.2)
            seen = trials_of(storage) if (folder / "study.db").exists() else []
            held = [t for t in seen[1:] if t.state == TrialState.RUNNING and WORKER in t.user_attrs and t.params]
        assert held, written(folder)
        processes += [start(folder, words, f"worker{index}") for index in range(workers - 1)]
        _wait_for(lambda: len(trials_of(storage)) > 3, folder)
        processes[0].send_signal(signal.SIGKILL)
        codes = [process.wait(timeout=400) for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * (workers - 1), written(folder)
    return trials_of(storage)


def _wait_for(happened: Callable[[], bool], folder: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, written(folder)
        time.sleep(0.2)


def assert_exact(trials: Sequence[FrozenTrial], total: int) -> None:
    states = [trial.state for trial in counting(trials)]
    assert states == [TrialState.COMPLETE] * total
    assert [trial.number for trial in trials] == list(range(len(trials)))
    drawn = [tuple(sorted(trial.params.items())) for trial in counting(trials)]
    assert len(set(drawn)) == total  # nothing was trained twice


@pytest.mark.slow
def test_workers_share_a_study_and_outlive_one_of_them(tmp_path: Path) -> None:
    trials = run_and_kill(tmp_path, trials=12, workers=3)
    assert_exact(trials, 12)
    (lost,) = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert lost.number == 1
    repeated = [trial for trial in counting(trials) if trial.params == lost.params]
    assert len(repeated) == 1  # by another worker, with the same values
    took_part = {trial.user_attrs[WORKER] for trial in counting(trials)}
    assert len(took_part) == 3  # the killed one's first trial among them
    assert (tmp_path / "studies" / "search" / "best.yaml").exists()


@pytest.mark.slow
def test_a_journal_files_running_trials_are_told_of_and_repeated_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tune(configuration(tmp_path), SPACE, trials=1, storage="journal:///study.journal")
    backend = optuna.storages.journal.JournalFileBackend("study.journal")
    study = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="search")
    study.ask({"model.optimizer.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)})  # and dies
    left = tune(configuration(tmp_path), SPACE, trials=2, storage="journal:///study.journal")
    assert len(left.finished) == 1
    left.print_table()
    assert "1 complete, 1 unfinished" in capsys.readouterr().out
    whole = tune(configuration(tmp_path), SPACE, trials=2, storage="journal:///study.journal", retry_running=True)
    assert_exact(whole.study.get_trials(), 2)


def trial(number: int, state: TrialState, **attributes: object) -> FrozenTrial:
    value = 0.0 if state == TrialState.COMPLETE else None
    made = create_trial(state=state, value=value, user_attrs=dict(attributes))
    made.number = number
    return made


def test_a_trial_is_surplus_once_enough_before_it_count() -> None:
    trials = [
        trial(0, TrialState.COMPLETE),
        trial(1, TrialState.FAIL),  # its worker was killed
        trial(2, TrialState.FAIL, **{ERROR: "ValueError"}),
        trial(3, TrialState.RUNNING),
        trial(4, TrialState.PRUNED, **{SURPLUS: True}),
        trial(5, TrialState.WAITING),
        trial(6, TrialState.RUNNING),
    ]
    assert [found.number for found in counting(trials)] == [0, 2, 3, 5, 6]
    assert [is_surplus(trials, number, 3) for number in (3, 5, 6)] == [False, True, True]
    assert not is_surplus(trials, 6, 5)


@pytest.mark.slow
def test_what_is_drawn_twice_in_a_hurry_is_stopped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race between counting and drawing, staged: a worker that always finds too few trials."""
    monkeypatch.chdir(tmp_path)
    counted = iter([0, 0, 0, 3])
    done = create_trial(value=0.0)
    monkeypatch.setattr(workers, "counting", lambda trials: [done] * next(counted))
    result = tune(configuration(tmp_path), SPACE, trials=2, sampler=optuna.samplers.TPESampler(seed=0))
    monkeypatch.undo()
    assert_exact(result.study.trials, 2)
    assert result.study.trials[2].user_attrs[SURPLUS]
    assert not result.study.trials[2].params
    assert len(result.finished) == 2
