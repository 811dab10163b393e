"""Losses that differentiate the model themselves need autograd in validation and test, where Lightning turns it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

# What torch says where something is to be differentiated that nothing has recorded.
_NOT_RECORDED = ("does not require grad", "nference tensor", "not have been used in the graph")


@contextmanager
def evaluating(module: pl.LightningModule, batch: Any, *, enabled: bool) -> Iterator[Any]:  # noqa: ANN401
    """Evaluate a batch inside the block: as Lightning has it, or with autograd on, whatever the Trainer turned off.

    Args:
        module: What is evaluated.
        batch: The batch; tensors that were made in inference mode are copied, as autograd takes no such ones.
        enabled: Whether autograd is turned on.

    Yields:
        The batch to use.

    Raises:
        RuntimeError: If something is differentiated while autograd is off, saying how to turn it on.
    """
    if enabled:
        with torch.inference_mode(False), torch.enable_grad():
            yield apply_to_collection(batch, Tensor, _recordable)
        return
    try:
        yield batch
    except RuntimeError as error:
        if torch.is_grad_enabled() or not any(text in str(error) for text in _NOT_RECORDED):
            raise
        raise RuntimeError(
            f"{type(module).__name__} differentiates in an evaluation, where Lightning turns autograd off: {error}. "
            f"Set evaluate_with_gradients = True, as an attribute of {type(module).__name__}."
        ) from error


def _recordable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
