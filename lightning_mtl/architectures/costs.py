"""Measures single forward passes: the parameters that take part, the multiply-adds, the time."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_mtl.gradients.graph import reached_leaves

WARM_UP_PASSES = 3

# What torch's counter lacks: products with a vector, sums of products, and nn.Bilinear, by the size of its weight.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, _, **__: 2 * prod(matrix),
    torch.ops.aten.addmv: lambda _, matrix, __, **___: 2 * prod(matrix),
    torch.ops.aten.dot: lambda one, _, **__: 2 * prod(one),
    torch.ops.aten.addbmm: lambda _, one, other, **__: 2 * prod(one) * other[-1],
    torch.ops.aten._trilinear: lambda inputs, weight, *_, **__: 2 * inputs[0] * prod(weight),
}


@contextmanager
def as_trained(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode inside the block, and each part back into its own mode after it."""
    parts = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in parts:
            part.training = training


def parameters_behind(module: nn.Module, run: Callable[[], Any]) -> list[nn.Parameter]:
    """Find the parameters of a module, frozen or not, that the result of ``run`` depends on, without compilation.

    Example:
        >>> used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> both = nn.ModuleList([used, unused])
        >>> parameters_behind(both, lambda: used(torch.ones(1, 2))) == list(used.parameters())
        True
    """
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in parameters]
    outputs: list[Tensor] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            apply_to_collection(run(), Tensor, outputs.append)
        reached = reached_leaves(outputs)
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
    return [parameter for parameter in parameters if parameter in reached]


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Run what the counter has no formula for as the operations that it stands for.

    These are the kernels of oneDNN and cuDNN for recurrent layers, those of transformer layers in evaluation mode, and
    scaled dot-product attention on the CPU.
    """
    mkldnn: Any = torch.backends.mkldnn
    cudnn, mha = torch.backends.cudnn, torch.backends.mha
    before = mkldnn.enabled, cudnn.enabled, mha.get_fastpath_enabled()
    try:
        # Their flags() would set more than this, and warn of it.
        mkldnn.enabled = cudnn.enabled = False
        mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mkldnn.enabled, cudnn.enabled = before[:2]
        mha.set_fastpath_enabled(before[2])


def multiply_adds(module: nn.Module, run: Callable[[], Any], needed: Collection[nn.Parameter]) -> int:
    """Count the multiply-adds of ``run``, without those of modules that have parameters but none of ``needed``.

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> multiply_adds(layers, lambda: layers(torch.ones(10, 4)), list(layers.parameters()))
        560
        >>> multiply_adds(layers, lambda: layers(torch.ones(10, 4)), list(layers[0].parameters()))
        320
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    begun, skipped = [0], [0]

    def begin(*_: Any) -> None:  # noqa: ANN401
        begun[0] = counter.get_total_flops()

    def end(*_: Any) -> None:  # noqa: ANN401
        skipped[0] += counter.get_total_flops() - begun[0]

    handles = []
    try:
        # None of them lies inside another, so that one beginning is enough to remember.
        for part in dict.fromkeys(_outermost_unneeded(module, set(needed))):
            handles += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
        eager = torch.compiler.set_stance("force_eager")
        with warnings.catch_warnings(), without_fused_kernels(), counter, torch.no_grad(), eager:
            # The counter hooks all modules, and nothing of it counts twice where nothing is compiled.
            warnings.filterwarnings("ignore", message="Using `torch.compile\\(module\\)` when there are global hooks")
            run()
    finally:
        for handle in handles:
            handle.remove()
    return (counter.get_total_flops() - skipped[0]) // 2


def _outermost_unneeded(module: nn.Module, needed: set[nn.Parameter]) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    if parameters and needed.isdisjoint(parameters):
        yield module
        return
    for child in module.children():
        yield from _outermost_unneeded(child, needed)


def latency_ms(module: nn.Module, run: Callable[[], Any], repeats: int) -> float:
    """Measure the median time of ``run`` in milliseconds, without gradients, after a few passes to warm up.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> latency_ms(layer, lambda: layer(torch.ones(1, 2)), repeats=3) > 0
        True
    """
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    times = []
    with torch.no_grad():
        for _ in range(WARM_UP_PASSES + repeats):
            _wait_for(device)
            began = time.perf_counter()
            run()
            _wait_for(device)
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[WARM_UP_PASSES:])


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
