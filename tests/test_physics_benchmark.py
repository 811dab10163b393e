"""The benchmark of physics-informed networks: it goes on where it was stopped, and tables what it has."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import physics


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "cells.json", tmp_path / "cells.png"
    short = ["--equations", "helmholtz", "--steps", "6", "--jobs", "1", "--scales", "1", "100", "--json", str(path)]
    once = physics.main([*short, "--seeds", "1", "--only", "equal"])
    assert len(json.loads(path.read_text())["results"]) == 2
    twice = physics.main([*short, "--seeds", "2", "--only", "equal", "fixed", "ReLo", "--png", str(picture)])
    results = json.loads(path.read_text())["results"]
    # Equal weights and ReLoBRaLo twice at two scales, four weights twice to choose from.
    assert len(results) == 4 + 4 + 8
    equal, tuned = (twice["helmholtz"][row] for row in (physics.EQUAL, physics.TUNED))
    assert [seeds[:1] for seeds in equal] == once["helmholtz"][physics.EQUAL]
    weights = {weight: [r["error"] for r in results if r["weight"] == weight] for weight in (10.0, 100.0, 1000.0)}
    assert tuned[0] == tuned[1]
    assert tuned[0] in [*weights.values(), [r["error"] for r in results if r["row"] == physics.TUNED][:2]]
    said = capsys.readouterr().out
    assert said.count("seed 0") == 2 + 2 + 4
    assert "ReLoBRaLo" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fixed_weights_divided_by_the_scale_make_the_same_training() -> None:
    """Why they train at one scale alone."""
    cells = [physics.Cell("burgers", physics.TUNED, scale, 0, 4, 100.0 / scale) for scale in (1.0, 10.0)]
    first, second = (physics.train(cell)["error"] for cell in cells)
    assert first == pytest.approx(second, rel=1e-4)


def test_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        physics.parse(["--seeds", "0"])
    assert "--seeds and --jobs must be at least 1" in capsys.readouterr().err
