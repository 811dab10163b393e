"""The command line: what it says of a mistake."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from lightning_mtl.configured.messages import condense
from tests.test_cli import EXAMPLES, config, in_a_folder, pytestmark, refused, run  # noqa: F401 - they hold here, too


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--trainer.callbacks+=MGDAA", "trainer.callbacks: 'MGDAA' is no class path, .*Did you mean MGDA.*NashMTL"),
        ("--trainer.callbacks+=lightning_mtl.weighting.Nash", "has no attribute 'Nash'.* NashMTL"),
        ("--model.optimizer=Adamm", "'Adamm' .* torch.optim. Did you mean Adam"),
        (
            "--model.optimizer=torch.optim.Adamm",
            r"error: model.optimizer: module 'torch.optim' has no attribute 'Adamm'. Did you mean Adam[^<]*$",
        ),
        ("--model.optimizer.lrr=1", r"error: model.optimizer: Option 'lrr' is not accepted[^<]*$"),
        ("--model.optimzer.lr=1", "unrecognized arguments: --optimzer.lr=1; did you mean optimizer?"),
        ("--model=MultitaskModule", "'MultitaskModule' .*Did you mean MultiTaskModule"),
        ("--model.accumulate_grad_batches=x", "accumulate_grad_batches: Expected a <class 'int'>. Got value: x"),
        ("--model.gradient_clip_val=-1", "gradient_clip_val=-1.0 must be above 0; leave it None for no clipping."),
        ("--data=multi_digits.MultiDigit", "module 'multi_digits' has no attribute 'MultiDigit'. .*MultiDigits"),
        ("--data=nowhere.Data", "No module named 'nowhere'; install it, or run in the folder where it lies"),
        ("--trainer.nothing=1", "nothing"),
        ("--trainer.callbacks+=GradNorm", "The Trainer holds two GradNorm; keep one of them."),
        ("--trainer.max_epoch=1", "max_epoch=1; did you mean --trainer.max_epochs?"),
        ("--trainer.callbacks+=GradNrm", "'GradNrm' .* Did you mean GradNorm .*There are AlignedMTL, (?!.*Throughput)"),
        ("--model.tasks.left.loss=crossentropy", "'crossentropy' .*Did you mean torch.nn.functional.cross_entropy"),
    ],
)
def test_a_mistake_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, expected: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = refused(monkeypatch, capsys, "fit", "--config", str(EXAMPLES / "run.yaml"), argument)

    assert re.search(expected, found), found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--trainer.callbacks+=MGDA"],
            "The Trainer holds 2 weightings, GradNorm and MGDA; keep one of them.",
        ),
        (["--trainer.gradient_clip_val=1"], "Trainer(gradient_clip_val=1) is not applied, "),
    ],
)
def test_what_a_fit_refuses_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "fit", "--config", str(EXAMPLES / "run.yaml"), *arguments)
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # below what Lightning says of the devices
    assert line.startswith(f"lightning-mtl: error: {expected}")


def test_what_users_code_raises_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loss = "from torch import Tensor\ndef loss(prediction, target) -> Tensor:\n    raise ValueError('mine')\n"
    Path("own.py").write_text(loss)
    file = config(model__init_args__tasks={name: {"loss": "own.loss"} for name in ("left", "right")})
    with pytest.raises(ValueError, match="mine"):
        run(monkeypatch, "fit", "--config", file, "--trainer.logger=false")


def test_a_bad_key_in_a_file_gets_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    text = (EXAMPLES / "run.yaml").read_text()
    Path("bad.yaml").write_text(text.replace("max_epochs", "max_epoch"))
    assert "'trainer.max_epoch'; did you mean trainer.max_epochs?" in refused(
        monkeypatch, capsys, "fit", "--config", "bad.yaml"
    )
    Path("bad.yaml").write_text(text.replace("\ndata:", "\ndta:"))
    assert "'dta.class_path'; did you mean data?" in refused(monkeypatch, capsys, "fit", "--config", "bad.yaml")
    Path("bad.yaml").write_text(text.replace("optimizer:", "optimiser:").replace("widths", "width"))
    found = refused(monkeypatch, capsys, "fit", "--config", "bad.yaml")
    assert "did you mean optimizer?" in found or "did you mean widths?" in found


def test_bad_files_get_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "File does not exist" in refused(monkeypatch, capsys, "fit", "--config", "missing.yaml")
    Path("broken.yaml").write_text("trainer: [")
    assert "line" in refused(monkeypatch, capsys, "fit", "--config", "broken.yaml")
    file = config(model__init_args__heads={"left": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}}})
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert "out_features" in refused(monkeypatch, capsys, "fit", "--config", file)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["test", "--ckpt_path=best"],
            r"test.ckpt_path: 'best' is known to the process of a fit alone.* give the file",
        ),
        (["fit", "--ckpt_path=missing.ckpt"], "fit.ckpt_path: there is no file 'missing.ckpt'; give the file"),
    ],
)
def test_a_checkpoint_that_cannot_be_there_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = refused(monkeypatch, capsys, *arguments, "--config", str(EXAMPLES / "run.yaml"))
    assert re.search(expected, found), found


@pytest.mark.parametrize("trunk", ["MMoE", "CGC"])
def test_experts_by_a_function_that_does_not_say_what_it_returns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    Path("untyped.py").write_text("from torch import nn\n\n\ndef expert():\n    return nn.Linear(100, 128)\n")
    arguments = {"experts": "untyped.expert", "tasks": ["left", "right"], "gate": 100}
    file = config(model__init_args__trunk={"class_path": trunk, "init_args": arguments})
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = refused(monkeypatch, capsys, "fit", "--config", file)
    assert "model.trunk.experts: Expected 'untyped.expert' to be a function that returns" in found
    assert "; annotate what it returns: def expert() -> Module (in lightning_mtl.architectures" in found


def test_an_unknown_command_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(monkeypatch, capsys, "fitt")
    assert "did you mean fit? The commands are fit, validate, test, predict, tune, compare, methods." in found


def test_a_message_in_several_parts_becomes_one_line() -> None:
    nested = 'Parser key "a":\n  Errors:\n    - Parser key "b":\n        Expected a <class \'int\'>. Got value: x'
    assert condense(nested) == "a.b: Expected a <class 'int'>. Got value: x"


def test_nan_as_yaml_writes_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = (
        '{"class_path": "lightning_mtl.Task", "init_args": {"loss": "torch.nn.functional.mse_loss", "missing": "%s"}}'
    )
    option = f'--model.tasks={{"a": {task}}}'
    for word, told in (("nan", True), ("none at all", False)):
        with pytest.raises(SystemExit):
            run(monkeypatch, "fit", "--model=MultiTaskModule", option % word)
        line = capsys.readouterr().err.splitlines()[-1]
        assert "missing: Expected a <class 'float'>" in line
        assert ("YAML writes NaN as .nan" in line) == told
    assert condense("plain") == "plain"


@pytest.mark.parametrize(("command", "extra"), [("fit", "cli"), ("methods", "cli"), ("tune", "tune")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, extra: str
) -> None:
    monkeypatch.setattr(sys.modules[main.__module__], "_is_installed", lambda module: False)
    said = refused(monkeypatch, capsys, command)
    assert re.search(rf"pip install ('jsonargparse\[signatures\]'|rich).*, as the extra {extra} of this package", said)
