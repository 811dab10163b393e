"""What benchmarks promise of their models, arguments and pictures; no timing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.floor import plot, rows
from benchmarks.on_gpu import main as on_gpu
from benchmarks.step_cases import Case, Trunk
from benchmarks.store import measured
from benchmarks.torchjd_results import add
from benchmarks.torchjd_results import draw as draw_steps
from benchmarks.trunks import PEER_TRUNKS, sized


@pytest.mark.parametrize("millions", [1, 3, 10])
def test_an_mlp_has_about_the_parameters_asked_for(millions: int) -> None:
    trunk = sized(millions)
    found = sum(parameter.numel() for parameter in trunk.make().parameters())
    assert found == pytest.approx(millions * 10**6, rel=0.005)
    assert isinstance(trunk.make()[trunk.last_layer], torch.nn.Linear)


@pytest.mark.parametrize("name", PEER_TRUNKS)
def test_a_case_has_the_batch_asked_for_and_heads_that_fit(name: str, tmp_path: Path) -> None:
    case = Case(name, 2, 1, str(tmp_path), PEER_TRUNKS, batch_size=4)
    trunk, heads = case.parts()
    features = trunk(case.batch[0])
    assert {task: head(features).shape for task, head in heads.items()} == {"task_0": (4, 10), "task_1": (4, 10)}


def test_memory_is_counted_from_the_same_beginning(tmp_path: Path) -> None:
    models = {"one layer": Trunk(lambda: torch.nn.Sequential(torch.nn.Linear(1000, 100)), (2, 1000), 0, 1.0)}
    case = Case("one layer", 2, 1, str(tmp_path), models)
    first, second = (case.peak(case.module(plain=True), None) for _ in range(2))
    assert first == pytest.approx(second, rel=0.05)
    assert first >= 4 * 4 * 100_000  # weights, gradients and Adam's two averages


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only where there is no GPU")
def test_without_a_gpu_the_gpu_script_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_gpu([])
    assert "--device cpu tries the script without one" in capsys.readouterr().err


def test_floors_are_drawn(tmp_path: Path) -> None:
    point = {"step_ms": 2.0, "over_ms": 1.5, "ratio": 4 / 3, "quartiles": [1.2, 1.5]}
    sweeps = {"tasks": (2, 8), "batch": (32, 128)}
    results = [
        {"sweep": sweep, "value": value, "variant": row.variant, **point}
        for sweep, values in sweeps.items()
        for value in values
        for row in rows(2)
    ]
    plot(results, "a title", tmp_path / "floor.png")
    assert (tmp_path / "floor.png").read_bytes().startswith(b"\x89PNG")


def test_steps_beside_torchjd_are_drawn() -> None:
    names = ("plain", "ours", "TorchJD", "TorchJD one by one")
    ratio = {"median": 0.9, "quartiles": [0.8, 1.1]}
    results = [
        {
            "cell": f"{trunk} K={k} B={batch} {method}",
            "step_ms": {name: float(k) for name in names},
            "ours_over_faster": ratio,
            "ours_over_default": ratio,
            "met": {"faster": True},
        }
        for trunk in ("mlp", "resnet")
        for k in (8, 2)
        for batch in (32, 256)
        for method in ("MGDA", "UPGrad")
    ]
    figure = draw_steps(results, "a title")
    assert [axes.get_title() for axes in figure.axes][::5] == ["mlp, batch 32, MGDA", "resnet, batch 32, K = 8"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["MGDA", "UPGrad"]
    assert np.array_equal(figure.axes[0].lines[0].get_xdata(), [2, 8])  # in order, whatever order the cells came in


def test_cells_of_several_runs_add_up_while_machine_and_versions_stay(tmp_path: Path) -> None:
    about = {"machine": "one", "versions": {"torch": "2"}, "threads": 1}
    path = tmp_path / "cells.json"
    add(path, about, [{"cell": "a", "ms": 1}, {"cell": "b", "ms": 1}])
    assert add(path, about, [{"cell": "b", "ms": 2}]) == [{"cell": "a", "ms": 1}, {"cell": "b", "ms": 2}]
    assert measured(path, about) == [{"cell": "a", "ms": 1}, {"cell": "b", "ms": 2}]
    assert measured(path, {**about, "machine": "another"}) == measured(tmp_path / "none.json", about) == []
    assert add(path, {**about, "machine": "another"}, [{"cell": "c", "ms": 3}]) == [{"cell": "c", "ms": 3}]


def test_cells_that_are_known_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cvxpy", reason="needs the extra bench")
    from benchmarks import against_torchjd

    done: list[str] = []

    def measure(cell: against_torchjd.Cell, *_: object) -> dict[str, object]:
        done.append(cell.method)
        return {"cell": " ".join(cell.name.split()), "met": {}}

    monkeypatch.setattr(against_torchjd, "measure", measure)
    monkeypatch.setattr(against_torchjd, "show", lambda *_: None)
    command = ["--quick", "--json", str(tmp_path / "cells.json"), "--only", "K=2"]
    against_torchjd.main([*command, "MGDA"])
    against_torchjd.main([*command, "--minutes", "0"])
    assert "2 cells are left" in capsys.readouterr().out
    against_torchjd.main(command)
    assert done == ["MGDA", "UPGrad", "UW"]
    against_torchjd.main([*command, "--again"])
    assert done[3:] == ["MGDA", "UPGrad", "UW"]


def test_the_readme_of_benchmarks_lists_every_file() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in folder.glob("*.py") if f"`{path.name}`" not in page]
    assert not missing
