"""Comparisons from the beginning to the page: a planted winner, rows, configurations, mistakes in one line."""

from __future__ import annotations

import csv
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.cli import main
from lightning_mtl.configured import ConfigurationError
from lightning_mtl.tuning import Setup, compare
from lightning_mtl.tuning.comparing import comparison
from lightning_mtl.tuning.comparing.plan import Candidate, Training
from lightning_mtl.tuning.comparing.rows import FIXED, INITIAL, SHORT, STANDARDIZED, fixed_weights, read_rows
from lightning_mtl.tuning.comparing.setups import SetupSource, declare_anew
from lightning_mtl.tuning.comparing.trainings import train
from lightning_mtl.weighting import MGDA
from tests.tuning.comparing.tiny import UNITS, model, setup
from tests.tuning.tiny import configuration

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
REGRESSIONS = {"a": Task(mse_loss), "b": Task(cross_entropy)}


def test_standardized_targets_win_where_units_differ_and_the_same_call_trains_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"methods": [], "rows": ["standardized"], "seeds": 3, "lrs": [1e-2], "progress": False}
    result = compare(setup(), folder=tmp_path, **arguments)
    found = result.against_equal[STANDARDIZED]
    assert found.significant
    assert found.interval.high < 0
    assert result.stage == "test"
    assert result.unfinished == 0
    assert result.figures is not None
    assert result.figures["norms"]["large"] > 100 * result.figures["norms"]["small"]
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = [row for row in rows if row["quantity"] == "delta_m_to_equal"]
    assert float(row["mean"]) == found.interval.mean
    assert [path.name for path in result.files] == ["comparison.csv", "comparison.png", "comparison.html"]
    assert "Take standardized targets" in (tmp_path / "comparison.html").read_text()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("lightning_mtl.tuning.comparing.queue.train", refuse)
    assert compare(setup(), folder=tmp_path, **arguments).records() == result.records()
    with pytest.raises(ConfigurationError, match=r"begun with another configuration or space \(seed\)"):
        compare(Setup(model, setup().data, setup().trainer, seed=7), folder=tmp_path, **arguments)


@pytest.mark.filterwarnings("ignore:In the first step the loss of task")  # of the plain calls
def test_a_training_is_that_of_plain_calls_with_the_same_seed() -> None:
    from lightning_mtl.transfer import train_and_score

    source = SetupSource(setup())
    rows, _ = read_rows(source.tasks, ["standardized"], {"mgda": MGDA}, 1)
    for row, task in ((rows[0], "small"), (rows[1], None), (rows[2], None)):
        outcome = train(source, row, Training("compare", row.key, task, Candidate(0, 1e-2), 3))

        def made(seed: int, changed: bool = row.name == STANDARDIZED) -> MultiTaskModule:
            module = model(1e-2)
            declared = {name: Task(mse_loss, standardize=changed) for name in UNITS}
            heads = {name: module.heads[name] for name in UNITS}
            return MultiTaskModule(module.trunk, heads, declared, optimizer=module._make_optimizer)

        def trainer(own: Any = row.make) -> Any:
            held: Any = setup().trainer()
            held.callbacks.extend([] if own(0) is None else [own(0)])
            return held

        loaders: Any = setup().data(3)
        tasks = None if task is None else [task]
        assert outcome.val == train_and_score(made, (loaders[0], loaders[1]), trainer, tasks=tasks, seed=3)
        assert outcome.test is not None
        assert outcome.test != outcome.val


def test_the_monitored_training_measures_what_a_step_for_one_task_does_to_the_other() -> None:
    def opposed(lr: float) -> MultiTaskModule:
        # Both tasks read the same feature, with opposite signs, in units of 1 and 2: g_2 = -2 g_1 throughout.
        signs = {"plus": 1.0, "minus": -2.0}

        def loss(sign: float, output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return sign * output.mean() + 10

        tasks = {task: Task(functools.partial(loss, sign)) for task, sign in signs.items()}
        heads = {task: nn.Identity() for task in signs}
        return MultiTaskModule(nn.Linear(4, 1), heads, tasks, optimizer=functools.partial(torch.optim.SGD, lr=lr))

    def data(seed: int) -> tuple[Any, ...]:
        rows = [
            (x, {"plus": 0.0, "minus": 0.0}) for x in torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        ]
        return DataLoader(rows, batch_size=8), DataLoader(rows, batch_size=8)  # type: ignore[arg-type]

    source = SetupSource(Setup(model=opposed, data=data, trainer=setup().trainer, lr=1e-3))
    (row,), _ = read_rows(source.tasks, [], [], 1)
    figures = train(source, row, Training("monitor", row.key, None, Candidate(0, 1e-3), 3), steps=60).figures
    assert figures["tasks"] == ["plus", "minus"]
    assert figures["conflict"] == 1.0
    # Relative to what the other's own step does: g_i · g_j / |g_j|².
    assert torch.tensor(figures["affinity"]) == pytest.approx(torch.tensor([[1.0, -0.5], [-2.0, 1.0]]), rel=1e-5)


def test_a_comparison_without_time_says_that_it_is_not_done(tmp_path: Path) -> None:
    result = compare(setup(), methods=[], rows=[], seeds=2, lrs=[1e-2], folder=tmp_path, timeout=0.0, progress=False)
    assert result.unfinished == 3
    assert "equal weights (0 of 2 seeds)" in result.markdown()
    assert "3 trainings are missing: the same command goes on." in (tmp_path / "comparison.html").read_text()


def test_rows_say_what_they_change_and_why_they_are_left_out() -> None:
    rows, left_out = read_rows(
        REGRESSIONS, list(SHORT), ["MGDA", {"class_path": "MGDA", "init_args": {"at": "features"}}], 3
    )
    by_name = {row.name: row for row in rows}
    assert by_name[STANDARDIZED].changes == {"a": {"standardize": True}}
    assert by_name[INITIAL].changes == {name: {"loss_scale": "initial"} for name in REGRESSIONS}
    assert len(by_name[FIXED].variants) == 3
    assert list(by_name)[-2:] == ["MGDA", "MGDA(at=features)"]
    assert left_out == {}
    _, left_out = read_rows({"b": REGRESSIONS["b"]}, list(SHORT), [], 1)
    assert "no task's loss" in left_out[STANDARDIZED]
    drawn = fixed_weights(["a", "b", "c"], 400)
    assert drawn[:2] == fixed_weights(["a", "b", "c"], 2)
    shares = torch.tensor([list(one.values()) for one in drawn]) / 3
    assert shares.sum(dim=1).allclose(torch.ones(400))
    assert shares.var(dim=0).mean() == pytest.approx(1 / 3 * 2 / 3 / 4, rel=0.1)  # Dirichlet(1, 1, 1)


def test_tasks_declared_anew_are_those_of_a_module_made_so() -> None:
    module = model(1e-2)
    declare_anew(module, {"large": {"standardize": (1.0, 2.0), "loss_scale": 5.0}})
    outputs = module(torch.zeros(2, 4))
    raw = (
        nn.Module.__call__(module.trunk, torch.zeros(2, 4)) @ module.heads["large"].weight.T
        + module.heads["large"].bias
    )
    assert torch.allclose(outputs["large"], 2 * raw + 1)
    assert module.recorder.scales is not None
    assert module.recorder.scales.of([0, 1]).tolist() == [1.0, 5.0]
    declare_anew(module, {"large": {"standardize": False}})
    assert torch.allclose(module(torch.zeros(2, 4))["large"], raw)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rows": ["sinlge"]}, "Did you mean single"),
        ({"methods": ["Nash"]}, "Nash"),
        ({"methods": [{"class_path": "MGDA", "init_args": {"alpha": 1}}]}, "alpha"),
        ({"methods": ["MGDA", "MGDA"]}, "twice"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"lrs": [0.0]}, "above 0"),
        ({"lr_path": "model.lr"}, "for configurations"),
        ({"metrics": ["accuracy"]}, "has none of task"),
        ({"draws": 0}, "draws=0"),
    ],
)
def test_mistakes_show_before_the_first_training(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        compare(setup(), folder=tmp_path, **{"progress": False, **changes})
    assert not (tmp_path / "comparison.csv").exists()


def test_ranks_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="without torchrun"):
        compare(setup())


@pytest.mark.slow
def test_the_command_compares_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("run.yaml").write_text(yaml.safe_dump(configuration(tmp_path)))
    words = ["lightning-mtl", "compare", "--config", "run.yaml", "--methods", "{class_path: GradNorm}", "--rows"]
    more = ["--seeds", "2", "--lrs", "0.01", "--trainer.max_epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*words, *more])
    main()
    shown = capsys.readouterr()
    assert "Comparison on validation data, 2 seeds" in shown.out
    assert "compare 7/7: equal weights, lr 0.01, seed 4, with monitors" in shown.err
    assert Path("comparison/comparison.html").exists()
    assert comparison.main_tasks({"a": Task(mse_loss, role="auxiliary"), "b": Task(mse_loss)}) == ("b",)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lr-path", "model.trunk"], "model.trunk is no learning rate"),
        (
            ["--lr-path", "model.lr"],
            "configuration: model.lr names no parameter: model has no 'lr'. There are",
        ),
        (["--lr-path", "model.lr"], "Name it with --lr-path model.init_args.optimizer.init_args.lr;"),
        (["--seed", "3"], "unrecognized arguments: --seed 3; did you mean --seeds?"),
        (["--trainer.max_epoch", "3"], "unrecognized arguments: --trainer.max_epoch 3"),
    ],
)
def test_the_command_refuses_a_mistake_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("run.yaml").write_text(yaml.safe_dump(configuration(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["lightning-mtl", "compare", "--config", "run.yaml", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("lightning-mtl: error")]
    assert expected in line
    assert line.count("did you mean") <= 1
