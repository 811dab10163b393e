"""What methods say of losses and gradients that they cannot work with, or that the user should know of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_utilities.core.rank_zero import rank_zero_info


def negative_losses(method: str, losses: Mapping[str, float], step: int) -> ValueError:
    """The refusal of a loss below 0 by a method that takes logarithms."""
    return ValueError(
        f"{method} takes the logarithm of each loss, and the losses are {dict(losses)} at step {step}; add to the "
        "negative ones the constant that makes them 0 at best."
    )


def log_zero_gradients(method: str, tasks: Sequence[str], step: int) -> None:
    """Log which tasks have no gradient, for the first time."""
    rank_zero_info(
        f"{method}: the gradients of {list(tasks)} are zero at step {step}, or next to it beside the longest; in such "
        "a step the others are weighed without them; they have the weight 0 at the trunk, the others' mean elsewhere."
    )
