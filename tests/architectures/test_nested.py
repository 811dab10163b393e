"""A trunk inside another module trains as it does alone, and what an absent task alone uses stays where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.architectures import SoftSharing
from lightning_mtl.weighting import MGDA, GradNorm, PCGrad, StaticWeights
from tests.architectures import models, trunks
from tests.architectures.models import INPUTS, TASKS, WIDTH
from tests.training import Steps, fit, loader


def norms() -> SoftSharing:
    """Running statistics show whose inputs a backbone has seen."""
    return SoftSharing({k: nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH)) for k in TASKS}, strength=0.1)


TRUNKS: Mapping[str, Callable[[], nn.Module]] = {**models.TRUNKS, "norms": norms, **trunks.TRUNKS}


class Wrapper(nn.Module):
    """A trunk of a user's own, which knows nothing of tasks."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"part": part})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(self.body["part"](x))


FORMS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "alone": lambda trunk: trunk,
    "Sequential": lambda trunk: nn.Sequential(nn.Identity(), trunk),
    "wrapper": Wrapper,
}


def build(name: str, form: str = "alone", **arguments: Any) -> MultiTaskModule:
    torch.manual_seed(3)
    trunk = TRUNKS[name]()
    torch.manual_seed(4)
    make = trunks.module_of if name in trunks.TRUNKS else models.module
    return make(FORMS[form](trunk), **arguments)


def batches(name: str) -> list[Any]:
    """Every way in which a task may be absent, a loader for each task, and all tasks at once."""
    found: list[Any] = []
    for seed in range(6):
        x, y = trunks.regression(seed=seed) if name in trunks.TRUNKS else models.batch(seed=seed)
        found += [
            (x, y),
            (x, {**y, "b": None}),
            (x, {"a": y["a"]}),
            {"a": (x, y["a"]), "b": None},
            {task: (x + 10 * place, own) for place, (task, own) in enumerate(y.items())},
            (x, {"b": y["b"]}),
        ][seed:][:1]
    return found


METHODS: Mapping[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "static": lambda: [StaticWeights({"a": 1.0, "b": 3.0})],
    "GradNorm": lambda: [GradNorm()],
    "MGDA": lambda: [MGDA()],
    "PCGrad": lambda: [PCGrad()],
}


QUICK = {("MMoE", "MGDA"), ("PLE", "PCGrad"), ("norms", "MGDA")}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if (name, method) in QUICK else pytest.mark.slow)
        for name in TRUNKS
        for method in METHODS
    ],
)
def test_a_trunk_inside_another_module_trains_to_the_bit_as_it_does_alone(name: str, method: str) -> None:
    trained = []
    for form in FORMS:
        module = build(name, form)
        fit(module, loader(*batches(name)), callbacks=METHODS[method]())
        trained.append(module.state_dict())
    for form, found in zip(FORMS, trained, strict=True):
        for (path, ours), alone in zip(found.items(), trained[0].values(), strict=True):
            assert ours == alone if isinstance(ours, dict) else torch.equal(ours, alone), f"{form}: {path}"


WAYS: Mapping[str, Callable[[], list[pl.Callback]]] = {
    "losses": list,
    "trunk": lambda: [MGDA()],
    "features": lambda: [MGDA(at="features")],
}

# By hand: the parts that the task b alone uses.
OWN = {
    "MMoE": ("gates.b.",),
    "DSelectK": ("gates.b.",),
    "static DSelectK": ("gates.b.",),
    "PLE": ("levels.0.gates.b.", "levels.1.gates.b.", "levels.1.experts.b."),
    "MTAN": ("attention.b.",),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "way", "form", "arguments"),
    [
        ("MMoE", "losses", "Sequential", {}),
        ("static DSelectK", "trunk", "wrapper", {}),
        ("DSelectK", "losses", "alone", {"accumulate_grad_batches": 2}),
        ("PLE", "trunk", "alone", {}),
        ("MTAN", "losses", "Sequential", {}),
        ("MMoE", "trunk", "alone", {"automatic": True}),
        *(pytest.param(name, way, form, {}, marks=SLOW) for name in OWN for way in WAYS for form in FORMS),
        pytest.param("MMoE", "trunk", "wrapper", {"accumulate_grad_batches": 2}, marks=SLOW),
        pytest.param("DSelectK", "losses", "Sequential", {"automatic": True}, marks=SLOW),
        *(pytest.param(name, "losses", "wrapper", {"compiled": True}, marks=SLOW) for name in ("MMoE", "MTAN")),
    ],
)
def test_what_an_absent_task_alone_uses_has_no_gradient(
    name: str, way: str, form: str, arguments: dict[str, Any]
) -> None:
    settings = dict(arguments)
    automatic, compiled = settings.pop("automatic", False), settings.pop("compiled", False)
    adam = functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    module = build(name, form, optimizer=adam, **settings)
    module.automatic_optimization = automatic
    own = [(p, n) for n, p in module.trunk.named_parameters() if any(part in n for part in OWN[name])]
    assert len(own) == len(module.trunk_parts.owned(["b"])) > 0
    if compiled:
        torch.compiler.reset()
        module.trunk = torch.compile(module.trunk, backend="aot_eager")  # type: ignore[assignment]
    size = module.accumulate_grad_batches
    given = [one for one in batches(name) for _ in range(size)]  # a window is of one kind
    steps, values = Steps(), [[p.detach().clone() for p, _ in own]]

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            values.append([p.detach().clone() for p, _ in own])

    weighting = WAYS[way]()
    if way == "features":
        given = [one for one in given if isinstance(one, tuple)]
    fit(module, loader(*given), callbacks=[*weighting, steps, Watch()])
    for step, gradients in enumerate(steps.gradients):
        one = given[step * size]
        present = (one[1] if isinstance(one, tuple) else one).get("b") is not None
        before, after = values[step * size], values[(step + 1) * size]
        for position, (_, path) in enumerate(own):
            gradient = next(g for n, g in gradients.items() if n.replace("_orig_mod.", "") == f"trunk.{path}")
            assert (gradient is not None) == present, (step, path)
            assert before[position].equal(after[position]) is not present, (step, path)


def test_a_users_penalty_of_an_absent_tasks_gate_counts() -> None:
    class Decayed(MultiTaskModule):
        def penalties(self) -> dict[str, Tensor]:
            return {**super().penalties(), "gate": self.trunk.get_parameter("gates.b.weight").square().sum()}

    plain = build("MMoE")
    module, steps = Decayed(plain.trunk, dict(plain.heads.items()), plain.tasks), Steps()
    expected = 2 * module.trunk.get_parameter("gates.b.weight").detach().clone()
    x, y = models.batch()
    fit(module, loader((x, {"a": y["a"]})), callbacks=[steps])
    torch.testing.assert_close(steps.gradients[0]["trunk.gates.b.weight"], expected)
