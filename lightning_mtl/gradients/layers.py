"""Which parameters a gradient is measured at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.graph import reached_leaves


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


def last_layer(trunk: nn.Module, cut: FeatureCut) -> list[Tensor]:
    """Find the trainable parameters of the trunk module with weights that ran last.

    Weights are parameters of two or more dimensions. What ran last is read off this step's autograd graph; where a
    compiled trunk is a single operation of it, the module defined last is taken.

    Raises:
        ValueError: If no such parameter took part in the forward pass.
    """
    order = reached_leaves(cut.outputs)
    last: nn.Module | None = None
    latest = -1
    for child in trunk.modules():
        for parameter in child.parameters(recurse=False):
            if parameter.ndim >= 2 and order.get(parameter, -1) >= max(latest, 0):
                last, latest = child, order[parameter]
    if last is None:
        raise ValueError(
            "at='last_layer' found no trainable weight of two or more dimensions in the trunk that its output depends "
            "on; unfreeze one, or measure at 'features'."
        )
    return [p for p in last.parameters(recurse=False) if p.requires_grad]
