"""The report's counts against sums by hand."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_mtl.architectures import CrossStitch, ParameterReport, SoftSharing, parameter_report
from tests.architectures.trunks import ltb, module_of, stages

# nn.Linear(i, o): i * o + o parameters, i * o multiply-adds a sample.
STAGES, HEAD = (3 * 5 + 5) + (5 * 5 + 5) + (5 * 4 + 4), 4 + 1
STAGE_ADDS, HEAD_ADDS, SAMPLES = 3 * 5 + 5 * 5 + 5 * 4, 4, 10
INPUTS = torch.zeros(SAMPLES, 3)


def report_of(trunk: nn.Module, **arguments: Any) -> ParameterReport:
    return parameter_report(module_of(trunk), INPUTS, repeats=2, **arguments)


def test_hard_sharing() -> None:
    report = report_of(nn.Sequential(*stages()))
    assert (report.multi_task.parameters, report.multi_task.shared) == (STAGES + 2 * HEAD, STAGES)
    assert report.multi_task.multiply_adds == SAMPLES * (STAGE_ADDS + 2 * HEAD_ADDS)
    for cost in report.single_task.values():
        assert (cost.parameters, cost.shared, cost.own) == (STAGES + HEAD, STAGES, HEAD)
        assert cost.multiply_adds == SAMPLES * (STAGE_ADDS + HEAD_ADDS)
        assert cost.milliseconds > 0
    assert report.single_task_total.parameters == 2 * (STAGES + HEAD)
    assert report.ratios["parameters"] == (STAGES + 2 * HEAD) / (2 * (STAGES + HEAD))
    assert report.idle == 0


class Branches(nn.Module):
    """A trunk that cannot leave a task out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unused = nn.Linear(3, 5), nn.Linear(7, 7)
        self.branches = nn.ModuleDict({task: nn.Linear(5, 4) for task in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.stem(x)
        return {task: branch(z) for task, branch in self.branches.items()}


def test_what_only_other_tasks_use_is_left_out() -> None:
    trunk = Branches()
    trunk.stem.requires_grad_(False)
    report = report_of(trunk)
    assert report.idle == 7 * 7 + 7
    assert report.multi_task.parameters == 20 + 2 * 24 + 2 * HEAD
    assert report.single_task["b"].parameters == 20 + 24 + HEAD
    assert report.single_task["b"].multiply_adds == SAMPLES * (15 + 20 + HEAD_ADDS)
    assert report.multi_task.multiply_adds == SAMPLES * (15 + 2 * 20 + 2 * HEAD_ADDS)
    assert not trunk.stem.weight.requires_grad
    assert trunk.unused.weight.requires_grad
    assert trunk.training
    assert not trunk.stem._forward_hooks
    assert not trunk.branches["a"]._forward_hooks


@pytest.mark.parametrize("kind", [SoftSharing, CrossStitch])
def test_single_task_models_that_the_trunk_names(kind: Any) -> None:
    report = report_of(kind({task: nn.Sequential(*stages()) for task in "ab"}))
    units = 2 * 4 if kind is CrossStitch else 0
    assert report.multi_task.parameters == 2 * (STAGES + HEAD) + units
    for cost in report.single_task.values():
        assert cost.parameters == STAGES + HEAD
        assert cost.multiply_adds == SAMPLES * (STAGE_ADDS + HEAD_ADDS)
    # All but the last stages and heads is shared by cross-stitch, nothing by soft sharing.
    assert report.multi_task.own == (2 * (STAGES + HEAD) if kind is SoftSharing else 2 * (24 + HEAD))


def test_a_hardened_tree() -> None:
    trunk = ltb()
    trunk.harden()
    report = report_of(trunk)
    # All read the first node of each stage; the others and the logits are idle.
    assert report.multi_task.parameters == (3 * 5 + 5) + (5 * 4 + 4) + 2 * HEAD
    assert report.multi_task.shared == 20 + 24
    assert report.idle == 2 * (20 + 24) + 9 + 6
    assert report.single_task["a"].parameters == 20 + 24 + HEAD


def test_compiled_counts_as_it_is_written() -> None:
    torch.compiler.reset()
    plain = module_of(nn.Sequential(*stages()))
    module = module_of(torch.compile(nn.Sequential(*stages()), backend="aot_eager"))  # type: ignore[arg-type]
    found, expected = (parameter_report(m, INPUTS, repeats=2) for m in (module, plain))
    assert found.multi_task.cells()[:-1] == expected.multi_task.cells()[:-1]


def test_models_to_compare_with() -> None:
    given = {task: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)) for task in "ab"}
    report = report_of(nn.Sequential(*stages()), single_task=given)
    assert report.single_task["a"].parameters == 8 + 3
    assert "as given" in str(report)
    with pytest.raises(ValueError, match=r"names \['a'\], but the tasks are \['a', 'b'\]"):
        report_of(nn.Linear(3, 4), single_task={"a": nn.Linear(3, 1)})
    with pytest.raises(ValueError, match="repeats=0"):
        parameter_report(module_of(nn.Linear(3, 4)), INPUTS, repeats=0)


def test_as_text_and_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(nn.Sequential(*stages()))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), console.export_text()):
        assert "multi-task / single-task" in text
        assert f"{report.single_task_total.parameters}" in text
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mtl\[tables\]"):
        report.table()
