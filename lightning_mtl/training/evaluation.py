"""Losses that differentiate the model themselves need autograd where it is off: in validation, and beside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mtl.task.module import TaskModule

# What torch says where something is to be differentiated that nothing has recorded.
_NOT_RECORDED = ("does not require grad", "nference tensor", "not have been used in the graph")


@contextmanager
def evaluating(module: TaskModule, batch: Any) -> Iterator[Any]:  # noqa: ANN401
    """Evaluate a batch inside the block: as Lightning has it, or with autograd on, whatever the Trainer turned off.

    Args:
        module: What is evaluated.
        batch: The batch; tensors that were made in inference mode are copied, as autograd takes no such ones.

    Yields:
        The batch to use.

    Raises:
        RuntimeError: If something is differentiated while autograd is off, saying how to turn it on.
    """
    if module.evaluate_with_gradients:
        with _recording(module):
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


def second_look(module: TaskModule) -> AbstractContextManager[object]:
    """Compute losses beside a step inside the block: without gradients, but for losses that may differentiate."""
    return _recording(module) if module.the_trunk is None or module.evaluate_with_gradients else torch.no_grad()


@contextmanager
def _recording(module: TaskModule) -> Iterator[None]:
    """Turn autograd on; the labels of such a batch are not counted, as those without gradients are not."""
    labels = module.recorder.labels
    counting, labels.counting = labels.counting, False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        labels.counting = counting


def _recordable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
