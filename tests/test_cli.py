"""The command line: training from YAML, what it saves, and what it says of a mistake."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

import lightning_mtl
from lightning_mtl import MultiTaskModule, weighting
from lightning_mtl.cli import main
from lightning_mtl.cli.method_table import methods
from lightning_mtl.configured import MultiTaskCLI
from lightning_mtl.configured.names import load_short_names
from tests.test_readme import commands_of

EXAMPLES = Path(__file__).parent.parent / "examples"
# LightningCLI 2.6 calls what jsonargparse 4.49 deprecates: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mtl", *arguments])
    main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *arguments)
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-mtl: error: ")
    return lines[0]


def config(**changes: Any) -> str:
    """The example's file with other values, keys as on the command line."""
    content = yaml.safe_load((EXAMPLES / "run.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        place = content
        for step in path:
            place = place[step]
        place[last] = value
    Path("changed.yaml").write_text(yaml.safe_dump(content))
    return "changed.yaml"


@pytest.mark.slow
# It says so of the folder that a test stage will not write to.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_example_trains_and_is_reproduced_by_what_it_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "fit", "--config", str(EXAMPLES / "run.yaml"), *SHORT)
    saved = Path("lightning_logs/version_0")
    (checkpoint,) = (saved / "checkpoints").glob("*.ckpt")
    first = torch.load(checkpoint, weights_only=True)
    resolved = yaml.safe_load((saved / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["trunk"]["class_path"] == "lightning_mtl.architectures.Layers"

    run(monkeypatch, "fit", "--config", str(saved / "config.yaml"))
    (again,) = Path("lightning_logs/version_1/checkpoints").glob("*.ckpt")
    second = torch.load(again, weights_only=True)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name

    for stage in ("validate", "predict"):  # a test is among the commands of the guide
        run(monkeypatch, stage, "--config", str(saved / "config.yaml"), "--ckpt_path", str(checkpoint))


def test_a_weighting_goes_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", config(trainer__callbacks=[]), *SHORT, "--trainer.callbacks+=MGDA"]
    for key, value in (("at", "features"), ("normalize", "l2")):
        arguments.append(f"--trainer.callbacks.{key}={value}")
    monkeypatch.setattr(sys, "argv", ["lightning-mtl"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cli = MultiTaskCLI(arguments, run=False)
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, weighting.MGDA)]  # type: ignore[attr-defined]
    assert (found.at, found.normalize) == ("features", "l2")


def test_the_scheduler_of_the_file_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mtl"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cli = MultiTaskCLI(["--config", str(EXAMPLES / "run.yaml"), *SHORT, "--trainer.max_epochs=2"], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    expected = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(expected, T_max=8)
    for _ in range(2):
        expected.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected.param_groups[0]["lr"])


def test_the_scheduler_that_lightnings_own_cli_puts_on_the_instance_steps() -> None:
    from types import MethodType

    from tests.small import batches, small
    from tests.training import loader

    module = small()

    def configure(self: pl.LightningModule) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    module.configure_optimizers = MethodType(configure, module)  # type: ignore[method-assign]
    for epochs in (2, 1):  # the second time, the function is wrapped already
        trainer = pl.Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
        )
        trainer.fit(module, loader(*batches(2)))
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**epochs


def test_a_checkpoint_of_a_fit_from_yaml_rebuilds_trunk_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    run(monkeypatch, "fit", "--config", str(EXAMPLES / "run.yaml"), *SHORT)
    (checkpoint,) = Path("lightning_logs").rglob("*.ckpt")
    loaded = MultiTaskModule.load_from_checkpoint(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(loaded.state_dict()), dict(saved))
    assert not any("trunk" in name for name in yaml.safe_load(next(Path().rglob("hparams.yaml")).read_text()))


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--version")
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"lightning-mtl {lightning_mtl.__version__} (torch {torch.__version__}")


def test_help_and_print_config_are_readable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--help")
    assert left.value.code == 0
    listed = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "tune", "methods"):
        assert f"\n  {command} " in listed
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "--config", str(EXAMPLES / "run.yaml"), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["max_skipped_steps"] == 100


def test_the_table_has_every_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "methods")
    printed = capsys.readouterr().out
    assert {method.name for method in methods()} == set(weighting.__all__)
    for name in weighting.__all__:
        assert f" {name} " in printed
    assert "2202.01017" in printed


def test_every_exported_name_is_a_short_name() -> None:
    names = load_short_names()
    assert names.keys() >= set(weighting.__all__)
    assert names["MTAN" if "MTAN" in names else "MLP"].startswith("lightning_mtl.architectures.")


@pytest.mark.slow
def test_the_installed_program_runs() -> None:
    program = Path(sys.executable).with_name("lightning-mtl")
    ran = subprocess.run([str(program), "methods"], capture_output=True, text=True, check=True)
    assert "NashMTL" in ran.stdout


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_every_command_of_the_guide_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("run.yaml", "multi_digits.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    # Those of searches, and what these leave, are run with the searches' tests.
    all_words = [words for words in commands_of("docs/guides/yaml.md") if words[0] == "lightning-mtl"]
    commands = [words[1:] for words in itertools.takewhile(lambda words: words[1] != "tune", all_words)]
    assert {words[0] for words in commands} == {"fit", "test", "methods"}
    for words in commands:
        if "--ckpt_path" in words:
            (checkpoint,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
            words[words.index("--ckpt_path") + 1] = str(checkpoint)
        if "--print_config" in words:
            with pytest.raises(SystemExit) as left:
                run(monkeypatch, *words)
            assert left.value.code == 0
        else:
            run(monkeypatch, *words, *([] if words == ["methods"] else SHORT))


@pytest.mark.slow
def test_importing_the_package_loads_no_extra() -> None:
    """What Lightning itself imports where it is installed does not count."""
    after_lightning = "import sys, lightning.pytorch; before = set(sys.modules)"
    code = f"{after_lightning}; import lightning_mtl; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    extras = {"jsonargparse", "optuna", "matplotlib", "sklearn", "rich", "torchjd", "safetensors"}
    assert not extras & {name.partition(".")[0] for name in loaded}
    assert "lightning_mtl.module" in loaded
