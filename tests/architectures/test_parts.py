"""What parts inside a trunk say of themselves is put together, and found by all that ask a trunk."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import MTAN, DSelectK, MMoE
from lightning_mtl.finetuning import add_task, export
from lightning_mtl.transfer import probe_transfer
from lightning_mtl.weighting import MGDA
from tests.architectures import models
from tests.architectures.models import INPUTS, TASKS, WIDTH, expert
from tests.architectures.test_nested import FORMS, SLOW, TRUNKS, build, norms
from tests.training import Steps, fit, gradients_of, loader, quiet_trainer


class Mean(nn.Module):
    """Mixes the tasks' features again."""

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(features.values())).mean(0)


def test_a_trunk_that_mixes_the_tasks_again_is_one_that_all_share() -> None:
    x, y = models.batch()
    module, steps = models.module(nn.Sequential(TRUNKS["MMoE"](), Mean())), Steps()
    everything = copy.deepcopy(module)
    everything.shared_parameters = lambda: list(everything.trunk.parameters())  # type: ignore[method-assign]
    for one in (module, everything):
        fit(one, loader((x, y)), callbacks=[MGDA(), steps])
    assert {**steps.gradients[0]}.keys() == steps.gradients[1].keys()
    for ours, theirs in zip(*(gradients.values() for gradients in steps.gradients), strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.equal(theirs)
    with pytest.raises(ValueError, match=r"asked for the tasks \['a'\] alone, but Sequential returns nothing .* False"):
        fit(module, loader({"a": (x, y["a"])}))
    module.trunk.takes_tasks = False  # type: ignore[assignment]
    fit(module, loader({"a": (x, y["a"])}))
    assert module.shared_parameters() == list(module.trunk.parameters())


class TwoParts(nn.Module):
    """Masks by MTAN, then experts for each task; and what two parts for different tasks say of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MTAN([nn.Linear(INPUTS, 4)], ["a", "b"], [4], layout="tokens")
        self.second = MMoE(lambda: nn.Linear(4, WIDTH), ["a", "b"], 4, num_experts=2)
        self.third = MMoE(expert, ["c"], INPUTS, num_experts=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        masked = {task: self.second(z)[task] for task, z in self.first(x).items()}
        return {**masked, **self.third(x)}


def test_what_several_parts_say_is_put_together() -> None:
    module, (x, y) = models.module(TwoParts()), models.batch()
    shared = {f"{k}.{n}" for k in ("first.stages", "second.experts", "third.experts") for n in _names(module, k)}
    names = {n for n, p in module.trunk.named_parameters() if any(p is q for q in module.shared_parameters())}
    assert names == shared
    ran: list[str] = []
    for name, part in module.trunk.named_modules():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    module.task_losses({"c": (x, y["c"])})
    assert not [name for name in ran if "a" in name.split(".") or name.endswith(("gates.b", "attention.b"))]
    assert "third.gates.c" in ran
    plain = module.present_outputs((x, {"a": y["a"]}))["a"].loss
    plain.backward()
    assert gradients_of(module)["trunk.first.attention.b.0.0.weight"] is None


def _names(module: MultiTaskModule, path: str) -> list[str]:
    return list(dict(module.trunk.get_submodule(path).named_parameters()))


@pytest.mark.slow
def test_other_places_find_a_part_inside_the_trunk(tmp_path: Path) -> None:
    module, x = build("MMoE", "wrapper"), torch.randn(4, INPUTS)
    with pytest.raises(ValueError, match="The trunk, MMoE, has an output for each task"):
        add_task(module, "d", nn.Linear(WIDTH, 1), Task(mse_loss))
    path = export(module, x, tmp_path / "b.pt2", tasks=["b"])
    program = torch.export.load(path)
    read = [
        node.name for node in program.graph.nodes if "gates" in node.name and node.op == "placeholder" and node.users
    ]
    assert [name.split("gates_")[1] for name in read] == ["b_weight"]
    torch.testing.assert_close(program.module()(x)["b"], module.eval()(x)["b"])


@pytest.mark.parametrize("form", ["alone", pytest.param("wrapper", marks=SLOW)])
def test_a_probe_gets_the_features_of_all_tasks(form: str) -> None:
    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH * len(TASKS), 1)

        def forward(self, features: Mapping[str, Tensor]) -> Tensor:
            y: Tensor = self.linear(torch.cat([features[task] for task in TASKS], -1))
            return y

    x = torch.randn(12, INPUTS)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    result = probe_transfer(
        build("norms", form),
        {"new": Task(mse_loss)},
        Concatenated,
        (data, torch.utils.data.DataLoader(data, batch_size=6)),
        functools.partial(quiet_trainer, max_epochs=1),
        num_samples=[8],
        trunk=lambda: FORMS[form](norms()),
    )
    assert len(result.frozen[0]) == len(result.scratch[0]) == 1


def _hugging_face(part: nn.Module) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **size))
    model.pooler = nn.Sequential(Pooled(), part)
    return model  # type: ignore[no-any-return]


class Pooled(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states[:, 0]


class Reading(nn.Module):
    def __init__(self, task: str) -> None:
        super().__init__()
        self.task, self.linear = task, nn.Linear(WIDTH, 1)

    def forward(self, output: Any) -> Tensor:
        y: Tensor = self.linear(output.pooler_output[self.task])
        return y


def test_a_part_of_a_hugging_face_model_is_asked_for_its_tasks() -> None:
    tasks: Sequence[str] = ("a", "b")
    part = DSelectK(lambda: nn.Linear(8, WIDTH), tasks, gate=8, num_experts=3)
    heads = {task: Reading(task) for task in tasks}
    module = MultiTaskModule(_hugging_face(part), heads, {task: Task(mse_loss) for task in tasks})
    own = {f"trunk.pooler.1.{name}" for name, _ in part.named_parameters() if name.startswith("gates")}
    assert set(dict(module.named_parameters())) - _paths(module) - {n for n in _all(module) if "heads" in n} == own
    ids, y, steps = torch.randint(20, (4, 5)), torch.randn(4, 1), Steps()
    turns = [{"a": ({"input_ids": ids}, y)}, {"b": ({"input_ids": ids}, y)}]
    fit(module, loader(*turns), callbacks=[MGDA(), steps])
    for gradients, absent in zip(steps.gradients, ("b", "a"), strict=True):
        assert {n.split(".")[4] for n, g in gradients.items() if "gates" in n and g is None} == {absent}


def _all(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _paths(module: MultiTaskModule) -> set[str]:
    shared = set(module.shared_parameters())
    return {name for name, p in module.named_parameters() if p in shared}
