"""``lightning-mtl tune``: what its pages say works, and one line for each mistake."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mtl.cli import main
from tests.test_readme import commands_of
from tests.tuning.tiny import SPACE, configuration

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    # An example keeps its default checkpoints.
    "ignore:Checkpoint directory .* exists",
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
    Path("run.yaml").write_text(yaml.safe_dump(configuration(tmp_path)))
    Path("space.yaml").write_text(yaml.safe_dump(SPACE))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mtl", *arguments])
    main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "tune", *arguments)
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Seed set", "[I "))]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-mtl: error: ")
    return lines[0]


GIVEN = ["--config", "run.yaml", "--space", "space.yaml", "--trials", "1"]


def changed(**changes: Any) -> None:
    Path("space.yaml").write_text(yaml.safe_dump({**SPACE, **changes}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: --config, --space, --trials"),
        ([*GIVEN, "--trials", "0"], "trials=0 must be at least 1"),
        ([*GIVEN, "--config", "nowhere.yaml"], "nowhere.yaml"),
        ([*GIVEN, "--space", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        ([*GIVEN, "--storage", "study.db"], "storage='study.db' is neither the URL of a database"),
        ([*GIVEN, "--storage", "oracular://x"], "storage='oracular://x' names no usable database"),
        ([*GIVEN, "--storage", "sqlite:////nowhere/study.db"], "cannot be opened: unable to open database file"),
        ([*GIVEN, "--trainer.nothing", "1"], "nothing"),
        ([*GIVEN, "--trainer.devices", "2"], "torchrun --nproc-per-node 2"),
    ],
)
def test_a_mistake_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"model.optimizer.lrr": [1]}, r"parameters.model.optimizer.lrr names no parameter: .* Did you mean .*lr"),
        ({"model.optimizer.lr": [0.1, "fast"]}, r"model.optimizer.lr: Expected a <class 'float'>"),
        ({"GradNorm.alpa": [1]}, r"GradNorm has no argument 'alpa'. Did you mean alpha"),
    ],
)
def test_a_space_that_names_no_parameter_gets_one_line_before_any_trial(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parameters: dict[str, Any],
    expected: str,
) -> None:
    changed(weighting=["GradNorm"], parameters=parameters)
    found = refused(monkeypatch, capsys, *GIVEN, "--storage", "sqlite:///study.db")
    assert re.search(expected, found), found
    assert not Path("study.db").exists()


def test_broken_yaml_gets_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("space.yaml").write_text("objective: [")
    assert "space.yaml is no YAML" in refused(monkeypatch, capsys, *GIVEN)
    Path("space.yaml").write_text("- a")
    assert "space.yaml must hold a mapping, found list" in refused(monkeypatch, capsys, *GIVEN)


def test_help_names_the_storages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "tune", "--help")
    assert left.value.code == 0
    assert "postgresql://" in capsys.readouterr().out


def test_a_search_none_of_whose_trials_has_a_value_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(parameters={"model.heads.left.in_features": [7]})
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "tune", *GIVEN)
    assert left.value.code == 1
    assert "First error, trial 0: RuntimeError" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/guides/search.md", "examples/search/README.md"])
def test_the_commands_of_the_pages_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are, in a folder like theirs, but for fewer and shorter trials and a storage on this machine."""
    found = [
        words for words in commands_of(page) if words[:2] == ["lightning-mtl", "tune"] or "best.yaml" in " ".join(words)
    ]
    assert len(found) >= 3
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), str(EXAMPLES / "search"), *sys.path])
    for name in ("run.yaml", "space.yaml"):
        (tmp_path / name).write_text((EXAMPLES / "search" / name).read_text())
    for words in dict.fromkeys(map(shlex.join, found)):
        arguments = shlex.split(words)[1:]
        here = [re.sub(r"^(postgresql|mysql).*", "sqlite:///study.db", word) for word in arguments]
        if here[0] == "tune":
            here[here.index("--trials") + 1] = "1"
        short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
        run(monkeypatch, *here, *short)
        capsys.readouterr()
