"""What users bring along: checkpointed and compiled trunks, hooks that count, heads that write in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.weighting import MGDA, GradDrop, GradNorm, PCGrad, UncertaintyWeighting
from tests.plain import momentum
from tests.small import TASKS, batches, heads, regressions, small, trunk
from tests.training import Steps, fit, flat_parameters, loader

WAYS: dict[str, Callable[[], list[Weighting]]] = {
    "no weighting": list,
    "losses": lambda: [UncertaintyWeighting(lr=0.1)],
    "features": lambda: [MGDA(at="features")],
    "layer": lambda: [GradNorm(lr=0.1)],
    "rows": lambda: [MGDA()],
    "now and then": lambda: [PCGrad(every_n_steps=2)],
    "aggregator": lambda: [GradDrop()],
}


def with_parts(make_trunk: Callable[[nn.Sequential], nn.Module], make_head: Callable[[nn.Module], nn.Module]) -> Any:
    torch.manual_seed(2)
    inner, outer = trunk(), heads()
    return MultiTaskModule(
        make_trunk(inner), {task: make_head(head) for task, head in outer.items()}, regressions(), optimizer=momentum
    )


def as_it_is(part: nn.Module) -> nn.Module:
    return part


def trained(module: MultiTaskModule, way: str, *callbacks: pl.Callback, **arguments: Any) -> Tensor:
    fit(module, loader(*batches(4, 3, 4, 4)), callbacks=[*WAYS[way](), *callbacks], **arguments)
    return flat_parameters(module)


def assert_trains_as_without(module: MultiTaskModule, way: str) -> None:
    expected, found = Steps(), Steps()
    parameters = trained(with_parts(as_it_is, as_it_is), way, expected)
    torch.testing.assert_close(trained(module, way, found), parameters, rtol=0, atol=1e-6)
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# Checkpointed trunks


class Checkpointed(nn.Module):
    """Forgets its activations, and counts how often it computes them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.computed = 0

    def compute(self, x: Tensor) -> Tensor:
        self.computed += 1
        result: Tensor = self.layers(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.compute, x, use_reentrant=False)
        return result


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_trunk(way: str) -> None:
    assert_trains_as_without(with_parts(Checkpointed, as_it_is), way)


@pytest.mark.parametrize(("way", "again"), [("losses", 1), ("features", 1), ("rows", len(TASKS))])
def test_a_checkpointed_trunk_is_computed_again_in_every_backward_pass(way: str, again: int) -> None:
    module = with_parts(Checkpointed, as_it_is)
    trained(module, way)
    assert module.trunk.computed == 4 * (1 + again)


# Compiled parts


class Compilations:
    """A backend of ``torch.compile`` that counts how often it is asked, and for what."""

    def __init__(self) -> None:
        self.number = 0
        self.operations: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.number += 1
        self.operations |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        return graph.forward


class Own(nn.Module):
    """A module of the user's: torch compiles none of its own in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def compiled(part: nn.Module, backend: Any) -> nn.Module:
    result: nn.Module = torch.compile(Own(part), backend=backend)  # type: ignore[assignment]  # a module it is
    return result


def compiled_in_place(part: nn.Module, backend: Any) -> nn.Module:
    whole = Own(part)
    whole.compile(backend=backend)
    return whole


of_torch_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
in_either_way = pytest.mark.parametrize(
    ("way", "compile_part"),
    [
        *((way, compiled) for way in ("features", "rows")),
        pytest.param("losses", compiled_in_place, marks=pytest.mark.slow),
        *(pytest.param(way, compiled, marks=pytest.mark.slow) for way in WAYS if way not in ("features", "rows")),
        pytest.param("rows", compiled_in_place, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)


@of_torch_dynamo
@in_either_way
def test_compiled_trunks_and_heads(way: str, compile_part: Callable[..., nn.Module]) -> None:
    torch.compiler.reset()
    part = functools.partial(compile_part, backend="aot_eager")
    assert_trains_as_without(with_parts(part, part), way)


@of_torch_dynamo
@pytest.mark.parametrize("way", ["features", "rows"])
def test_a_compiled_decoder_that_tasks_share(way: str) -> None:
    def with_decoder(make_part: Callable[[nn.Module], nn.Module]) -> MultiTaskModule:
        torch.manual_seed(2)
        inner, decoder = trunk(), make_part(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()))
        outer = {task: nn.Sequential(decoder, nn.Linear(4, 1)) for task in TASKS}
        return MultiTaskModule(inner, outer, regressions(), optimizer=momentum)

    torch.compiler.reset()
    parameters = trained(with_decoder(as_it_is), way)
    part = functools.partial(compiled, backend="aot_eager")
    torch.testing.assert_close(trained(with_decoder(part), way), parameters, rtol=0, atol=1e-6)


@of_torch_dynamo
@pytest.mark.parametrize("way", ["layer", "rows"])
def test_a_trunk_compiled_for_one_backward_pass_is_refused_where_there_are_several(way: str) -> None:
    """It would write over what the second pass needs."""
    torch.compiler.reset()
    module = with_parts(functools.partial(compiled, backend="aot_eager"), as_it_is)
    trained(module, "losses")
    with pytest.raises(ValueError, match=r"Call torch.compiler.reset\(\) before the training"):
        trained(module, way)
    torch.compiler.reset()
    trained(module, way)
    trained(module, "losses")  # what may be passed again may be passed once


@of_torch_dynamo
@in_either_way
def test_nothing_is_compiled_anew_in_later_steps(way: str, compile_part: Callable[..., nn.Module]) -> None:
    torch.compiler.reset()
    backend, numbers = Compilations(), []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            numbers.append(backend.number)

    part = functools.partial(compile_part, backend=backend)
    fit(with_parts(part, part), loader(*batches(*[4] * 6)), callbacks=[*WAYS[way](), Counting()])
    assert numbers[0] >= 2  # the trunk, and one for all heads, which run the same code
    assert numbers[1:] == [numbers[1]] * 5
    assert not any("view" in operation or "detach" in operation for operation in backend.operations)  # of ours


# Hooks


class Hooks(pl.Callback):
    def __init__(self) -> None:
        self.after_backward = self.before_step = 0

    def on_after_backward(self, *_: Any) -> None:
        self.after_backward += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.before_step += 1


@pytest.mark.parametrize("way", WAYS)
def test_hooks_fire_once_a_step(way: str) -> None:
    hooks = Hooks()
    trained(small(optimizer=momentum), way, hooks)
    assert (hooks.after_backward, hooks.before_step) == (4, 4)


@pytest.mark.parametrize("way", ["losses", "features", "rows"])
def test_hooks_of_accumulated_steps(way: str) -> None:
    hooks = Hooks()
    trained(small(optimizer=momentum, accumulate_grad_batches=2), way, hooks)
    assert (hooks.after_backward, hooks.before_step) == (4, 2)


# Heads that write in place


class OwnFeatures(nn.Module):
    """Each head reads a tensor that no other head reads, so that it may write into it."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.branches = nn.ModuleDict({task: nn.Linear(4, 4) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.stem(x)
        return {task: branch(z) for task, branch in self.branches.items()}


def with_relus(make_trunk: Callable[[], nn.Module], relus: dict[str, nn.Module | None]) -> MultiTaskModule:
    torch.manual_seed(2)
    outer = {task: nn.Sequential(*([] if relu is None else [relu]), nn.Linear(4, 1)) for task, relu in relus.items()}
    return MultiTaskModule(make_trunk(), outer, regressions(), optimizer=momentum)


def flattened() -> nn.Module:
    """Its output is a view of what its last layer returned."""
    return nn.Sequential(trunk()[:3], nn.Unflatten(1, (2, 2)), nn.Flatten())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make_trunk", "writing"),
    [
        (lambda: OwnFeatures(trunk()), {"a": nn.ReLU(inplace=True), "b": nn.ReLU(inplace=True)}),
        # Plain PyTorch hands one tensor to both heads: the second reads what the first has written.
        (lambda: trunk()[:3], {"a": nn.ReLU(inplace=True), "b": None}),
        (flattened, {"a": nn.ReLU(inplace=True), "b": None}),
    ],
    ids=["features of their own", "shared features", "a view"],
)
def test_heads_that_begin_in_place(
    make_trunk: Callable[[], nn.Module], writing: dict[str, nn.Module | None], way: str
) -> None:
    expected, found = Steps(), Steps()
    parameters = trained(with_relus(make_trunk, dict.fromkeys(TASKS, nn.ReLU())), way, expected)
    torch.testing.assert_close(trained(with_relus(make_trunk, writing), way, found), parameters, rtol=0, atol=1e-6)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert [gradient for gradient in ours.values() if gradient is not None]
        for gradient, other in zip(ours.values(), theirs.values(), strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)
    assert len(found.weights) == len(expected.weights) == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writer", TASKS)
def test_what_plain_pytorch_refuses_to_write_is_refused(writer: str, way: str) -> None:
    """The first head's layer needs what the second one overwrites, or the trunk's tanh does."""
    module = with_relus(trunk if writer == "a" else lambda: trunk()[:3], dict.fromkeys(TASKS))
    module.heads[writer] = nn.Sequential(nn.ReLU(inplace=True), module.heads[writer])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(module, way)
