"""The base of methods that change another method's weights, and measure, weigh heads and remember as that one does."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import send
from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.holder import Holder
from lightning_mtl.method.signals import Signals


class Wrapper(Holder, Weighting):
    """Holds another method, which Lightning's hooks reach as if the Trainer held it, and saves its state with its own.

    Args:
        weighting: The other method, constructed without ``importance``, ``start_step`` and ``total``.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``weighting`` has an argument that belongs to the wrapper.
        TypeError: If ``weighting`` is no weighting, or finds its weights from whole gradients or none at all.
    """

    def __init__(self, weighting: Weighting, **common: Unpack[CommonArguments]) -> None:
        name = type(self).__name__
        given: object = weighting
        if not isinstance(given, Weighting) or given.measures == "rows":
            raise TypeError(
                f"{name}(weighting=...) takes the weights of a Weighting that finds them from losses, norms or a "
                f"Gramian, found {type(given).__name__}; pass an instance of one that does."
            )
        if weighting.renews_rows:
            raise TypeError(
                f"{name}(weighting={type(weighting).__name__}(...)) does not hand gradients on; wrap the other way "
                f"round: {type(weighting).__name__}({name}(...))."
            )
        if weighting.importance or weighting.start_step or weighting.total is not None:
            raise ValueError(
                f"{name}(weighting={type(weighting).__name__}(...)) ignores the importance, start_step and total of "
                f"what it wraps; pass them to {name}."
            )
        # What classes declare, this one has from its instance's partner.
        self.measures, self.weighs_heads = weighting.measures, weighting.weighs_heads  # type: ignore[misc]
        self.reads_losses = weighting.reads_losses  # type: ignore[misc]
        self.takes_logarithms, self.step_metric = weighting.takes_logarithms, weighting.step_metric
        self.wants_losses_after, self.negligible = weighting.wants_losses_after, weighting.negligible
        self.kernel_probes = weighting.kernel_probes
        super().__init__(
            at=weighting.at, every_n_steps=weighting.every_n_steps, gradients=weighting.gradients, **common
        )
        self.weighting = weighting
        self.add_child(weighting)

    def probes(self, device: torch.device) -> torch.Generator:
        """The wrapped method's random numbers."""
        return self.weighting.probes(device)

    def newest(self, signals: Signals) -> Tensor:
        """Ask the wrapped method for its weights, ``[K]``."""
        return send(self.weighting.weigh(signals).detach(), signals.losses.device, signals.losses.dtype)

    def head_weights(self) -> Tensor | None:
        """Ask the wrapped method, whose numbers for the heads are its own affair."""
        return self.weighting.head_weights()

    def scaled(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Let the wrapped method say what importance does to its weights."""
        return self.weighting.scaled(weights, importance)

    def update(self, signals: Signals) -> None:
        """Let the wrapped method update its state."""
        self.weighting.update(signals)
