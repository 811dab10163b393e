"""Which parameters a gradient is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.ranks import Ranks


def named_parameters_at(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Collect the trainable parameters of the named submodules.

    Raises:
        ValueError: If a name is unknown, or the modules hold nothing that can be trained.
    """
    modules = dict(module.named_modules())
    if unknown := [name for name in names if name not in modules]:
        choices = [name for name, child in modules.items() if name and any(True for _ in child.parameters())]
        raise ValueError(f"at={list(names)} names {unknown}, which the module does not have; it has {choices}.")
    found = dict.fromkeys(p for name in names for p in modules[name].parameters() if p.requires_grad)
    if not found:
        raise ValueError(f"at={list(names)} holds no parameter that can be trained; name modules that do.")
    return list(found)


def last_layer(
    trunk: nn.Module, cut: FeatureCut, ranks: Ranks | None = None, *, among: Iterable[Tensor] | None = None
) -> list[Tensor]:
    """Find the trainable parameters of the trunk module with weights that ran last, the same on all ranks.

    Weights are parameters of two or more dimensions. What ran last is read off this step's autograd graph; where a
    compiled trunk is a single operation of it, the module defined last is taken. Only those in ``among`` count. Where
    heads read features of their own, the last module before each head's features counts, which may be several.

    Raises:
        ValueError: If no such parameter took part in the forward pass.
    """
    wanted = set(trunk.parameters() if among is None else among)
    modules = list(trunk.modules())
    weights = [[p for p in child.parameters(recurse=False) if p.ndim >= 2 and p in wanted] for child in modules]
    found = torch.zeros(len(modules))
    for outputs in {reader for reader in cut.readers if reader} or {frozenset(range(len(cut.outputs)))}:
        order = reached_leaves([cut.outputs[index] for index in sorted(outputs)])
        latest = [max((order.get(p, -1) for p in own), default=-1) for own in weights]
        if max(latest, default=-1) >= 0:
            found[_last_argmax(latest)] = 1
    if ranks is not None and ranks.size > 1:  # a rank whose batch is empty has no graph to read
        found = ranks.sum(found.to(next(trunk.parameters()).device))
    if not found.any():
        raise ValueError(
            "at='last_layer' found no trainable weight of two or more dimensions in the trunk that its output depends "
            "on; unfreeze one, or measure at 'features'."
        )
    layers = [modules[index] for index in found.nonzero().flatten().tolist()]
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad))


def _last_argmax(numbers: Sequence[int]) -> int:
    largest = max(numbers)
    return max(index for index, number in enumerate(numbers) if number == largest)
