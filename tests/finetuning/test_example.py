"""The example runs and leaves what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import finetune


@pytest.mark.slow
def test_it_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main(["--repeats", "1", "--epochs", "4", "--picture", str(tmp_path / "ways.png")])
    shown = capsys.readouterr().out
    for expected in (*finetune.WAYS, "5 or more", "thawed step by step against frozen trunk"):
        assert expected in shown
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")


def test_no_scan_is_trained_and_tested_on() -> None:
    many, few, held_out = finetune.load(seed=3)
    tested = {scan.numpy().tobytes() for inputs, _ in held_out.values() for scan in inputs}
    assert not tested.intersection(scan.numpy().tobytes() for scan in (*many[0], *few[0]))
    assert list(few[1]) == list(finetune.NEW)
    assert len(few[0]) == finetune.LABELED
    assert len(many[0]) + len(few[0]) + len(held_out["new"][0]) == 1797


def test_arguments_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main(["--repeats", "0"])
    assert "at least 1" in capsys.readouterr().err
