"""The parameters that a gradient is measured at are found here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.graph import leaves_read_last


def parameters_at(
    at: str | Sequence[str],
    module: nn.Module,
    groups: Iterable[Sequence[Tensor]],
    ranks: Ranks,
    *,
    among: Iterable[Tensor],
) -> list[Tensor]:
    """Find the parameters of a place; ``"last_layer"`` as :func:`last_layer` finds it in the module's ``trunk``."""
    if at != "last_layer":
        return named_parameters_at(module, [at] if isinstance(at, str) else at)
    return last_layer(module.get_submodule("trunk"), groups, ranks, among=among)


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
    trunk: nn.Module, groups: Iterable[Sequence[Tensor]], ranks: Ranks | None = None, *, among: Iterable[Tensor]
) -> list[Tensor]:
    """Find the trainable parameters of the trunk module with weights that ran last, the same on all ranks.

    Weights are parameters of two or more dimensions; those of a parametrization are its module's. What ran last is read
    off this step's autograd graph; where a compiled trunk is a single operation of it, the module defined last is
    taken.

    Args:
        trunk: Its modules are searched.
        groups: What heads read: outputs of the trunk. Where heads read features of their own, each has a group, and the
            last module before each group counts.
        ranks: Who has to agree.
        among: The parameters that count.

    Raises:
        ValueError: If no such parameter took part in the forward pass.
    """
    weights = {p for p in among if p.ndim >= 2}
    modules = [module for module in trunk.modules() if not isinstance(module, ParametrizationList)]
    found: set[int] = set()
    for roots in groups:
        read = leaves_read_last(roots, weights)
        found.update(
            [i for i, module in enumerate(modules) if read and not read.isdisjoint(_own_parameters(module))][-1:]
        )
    if ranks is not None and ranks.size > 1:  # a rank whose batch is empty has no graph to read
        marks = torch.zeros(len(modules))
        marks[list(found)] = 1
        found = set(ranks.sum(marks.to(next(trunk.parameters()).device)).nonzero().flatten().tolist())
    if not found:
        raise ValueError(
            "at='last_layer' found no trainable weight of two or more dimensions in the trunk that its output depends "
            "on; unfreeze one, or measure at 'features'."
        )
    layers = [modules[index] for index in sorted(found)]
    return list(dict.fromkeys(p for layer in layers for p in _own_parameters(layer) if p.requires_grad))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters without its children's; a parametrization is no child but the way a weight is written."""
    own = list(module.parameters(recurse=False))
    return own + (list(module.parametrizations.parameters()) if is_parametrized(module) else [])  # type: ignore[union-attr]
