"""Which parameters a gradient is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    compiled trunk is a single operation of it, the module defined last is taken. Only those in ``among`` count, so that
    the layer is one that tasks share.

    Raises:
        ValueError: If no such parameter took part in the forward pass.
    """
    order = reached_leaves(cut.outputs)
    shared = set(trunk.parameters() if among is None else among)
    modules = list(trunk.modules())
    last, latest = -1, 0
    for index, child in enumerate(modules):
        for parameter in child.parameters(recurse=False):
            if parameter.ndim >= 2 and parameter in shared and order.get(parameter, -1) >= latest:
                last, latest = index, order[parameter]
    # A rank whose batch is empty has no graph to read.
    last = last if ranks is None else ranks.largest(last, next(trunk.parameters()).device)
    if last < 0:
        raise ValueError(
            "at='last_layer' found no trainable weight of two or more dimensions in the trunk that its output depends "
            "on; unfreeze one, or measure at 'features'."
        )
    return [p for p in modules[last].parameters(recurse=False) if p.requires_grad]
