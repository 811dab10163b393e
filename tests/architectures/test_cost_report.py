"""The report's counts against sums by hand."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_mtl.architectures import (
    CGC,
    MTAN,
    PLE,
    CrossStitch,
    DSelectK,
    MMoE,
    ParameterReport,
    SoftSharing,
    parameter_report,
)
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


def expert(inputs: int = 3) -> nn.Module:
    return nn.Linear(inputs, 4)


# An expert of three numbers, one of four, and what mixing E experts of four outputs takes.
EXPERT, ADDS, NEXT, NEXT_ADDS = 16, 12, 20, 16
# The trunk; parameters of experts and gates that are shared, and of one task; multiply-adds a sample, all and one task.
BY_HAND: dict[str, tuple[Any, int, int, int, int]] = {
    "MMoE": (lambda: MMoE(expert, ["a", "b"], 3, num_experts=5), 5 * EXPERT, 15, 5 * ADDS + 2 * 35, 5 * ADDS + 35),
    "MMoE of modules": (
        lambda: MMoE([expert() for _ in range(5)], ["a", "b"], 3),
        *(5 * EXPERT, 15, 5 * ADDS + 2 * 35, 5 * ADDS + 35),
    ),
    # k = 2 selectors of two bits: 2 + 4 numbers, linear in three inputs with biases, or as they are.
    "DSelectK": (
        lambda: DSelectK(expert, ["a", "b"], gate=3, num_experts=4),
        *(4 * EXPERT, 4 * 6, 4 * ADDS + 2 * (18 + 16), 4 * ADDS + 18 + 16),
    ),
    "static DSelectK": (
        lambda: DSelectK(expert, ["a", "b"], num_experts=4),
        *(4 * EXPERT, 6, 4 * ADDS + 2 * 16, 4 * ADDS + 16),
    ),
    # Of a task: two experts and a gate of 3 x 3 numbers.
    "CGC": (
        lambda: CGC(expert, ["a", "b"], 3, task_experts=2),
        *(EXPERT, 2 * EXPERT + 9, 5 * ADDS + 2 * (9 + 12), 3 * ADDS + 9 + 12),
    ),
    # In the first level every expert, a gate a task, and the shared gate; in the second a task's expert and gate, and
    # the shared expert.
    "PLE": (
        lambda: PLE([expert, lambda: expert(4)], ["a", "b"], [3, 4]),
        *(3 * EXPERT + 9 + NEXT, 6 + NEXT + 8),
        3 * ADDS + 2 * (6 + 8) + (9 + 12) + 3 * NEXT_ADDS + 2 * (8 + 8),
        3 * ADDS + (6 + 8) + (9 + 12) + 2 * NEXT_ADDS + (8 + 8),
    ),
    # Backbone; f from 4 to 5 channels and its norm; masks of two maps with norms, of 4 and 2 * 5 inputs.
    "MTAN": (
        lambda: MTAN([nn.Linear(3, 4), (nn.Linear(4, 5), nn.Linear(5, 4))], ["a", "b"], [4, (5, 4)], layout="tokens"),
        *(16 + 25 + 24 + (25 + 10), (20 + 8) * 2 + (44 + 8) + (20 + 8)),
        12 + 20 + 20 + 2 * (20 + 16 + 16 + 40 + 16),
        12 + 20 + 20 + (20 + 16 + 16 + 40 + 16),
    ),
    "Sequential": (
        lambda: nn.Sequential(nn.Linear(3, 3), MMoE(expert, ["a", "b"], 3, num_experts=5)),
        *(12 + 5 * EXPERT, 15, 9 + 5 * ADDS + 2 * 35, 9 + 5 * ADDS + 35),
    ),
    "Sequential with backbones": (
        lambda: nn.Sequential(nn.Linear(3, 3), SoftSharing(expert(), ["a", "b"])),
        *(12, EXPERT, 9 + 2 * ADDS, 9 + ADDS),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_architecture_by_hand(name: str) -> None:
    make, shared, own, adds, adds_alone = BY_HAND[name]
    report = report_of(make())
    assert (report.multi_task.shared, report.multi_task.own) == (shared, 2 * (own + HEAD))
    assert report.multi_task.multiply_adds == SAMPLES * (adds + 2 * HEAD_ADDS)
    assert report.idle == 0
    for cost in report.single_task.values():
        assert (cost.shared, cost.own) == (shared, own + HEAD)
        assert cost.multiply_adds == SAMPLES * (adds_alone + HEAD_ADDS)


class First(nn.Module):
    """Tokens through a layer, as it is called, to the first token's features."""

    def __init__(self, layer: nn.Module, call: Any) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.call(self.layer, tokens)
        return y[:, 0]


def attended(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (z.unflatten(2, (2, 2)).transpose(1, 2) for z in layer[0](x).chunk(3, -1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    y: Tensor = layer[1](mixed.transpose(1, 2).flatten(2))
    return y


N, T = 3, 7  # samples and tokens of four features
PROJECTIONS, ATTENTION = N * T * (4 * 12 + 4 * 4), 2 * N * T * T * 4
SEQUENCES: dict[str, tuple[Any, Any, int, int]] = {
    "LSTM": (nn.LSTM(4, 4, batch_first=True), lambda m, x: m(x)[0], 4 * (32 + 8), N * T * 4 * 32),
    "LSTM, two ways": (
        nn.LSTM(4, 2, num_layers=2, bidirectional=True, batch_first=True),
        lambda m, x: m(x)[0],
        *(4 * 8 * (4 + 2 + 2), 4 * N * T * 8 * (4 + 2)),
    ),
    "GRU": (nn.GRU(4, 4, batch_first=True), lambda m, x: m(x)[0], 3 * (32 + 8), N * T * 3 * 32),
    "encoder layer": (
        nn.TransformerEncoderLayer(4, 2, 12, batch_first=True),
        lambda m, x: m(x),
        *(60 + 20 + 60 + 52 + 16, PROJECTIONS + ATTENTION + N * T * 2 * 48),
    ),
    "decoder layer": (
        nn.TransformerDecoderLayer(4, 2, 12, batch_first=True),
        lambda m, x: m(x, x),
        *(2 * (60 + 20) + 60 + 52 + 24, 2 * (PROJECTIONS + ATTENTION) + N * T * 2 * 48),
    ),
    "attention": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
        *(80, PROJECTIONS + ATTENTION),
    ),
    "scaled dot products": (
        nn.Sequential(nn.Linear(4, 12), nn.Linear(4, 4)),
        attended,
        *(80, PROJECTIONS + ATTENTION),
    ),
    "products with a vector": (nn.Linear(4, 4), lambda m, x: x * (x @ m.weight[0])[..., None], 20, N * T * 4),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_layers_of_sequences_by_hand(name: str) -> None:
    layer, call, parameters, adds = SEQUENCES[name]
    layer.eval()
    report = parameter_report(module_of(First(layer, call)), torch.randn(N, T, 4), repeats=1)
    idle = 4 if name == "products with a vector" else 0
    assert (report.multi_task.shared, report.idle) == (parameters - idle, idle)
    assert report.multi_task.multiply_adds == adds + 2 * N * 4
    assert [cost.multiply_adds for cost in report.single_task.values()] == [adds + N * 4] * 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_bert_by_hand() -> None:
    transformers: Any = pytest.importorskip("transformers")
    size = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=9, **size), add_pooling_layer=False)
    trunk = First(bert, lambda m, ids: m(ids).last_hidden_state)
    report = parameter_report(module_of(trunk), torch.randint(9, (N, T)), repeats=1)
    layers = 2 * (PROJECTIONS + ATTENTION + N * T * 2 * 48)
    assert report.multi_task.multiply_adds == layers + 2 * N * 4


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
    with pytest.raises(ModuleNotFoundError, match="pip install rich"):
        report.table()
