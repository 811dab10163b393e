"""When the ranks average their gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.strategies import DDPStrategy

from lightning_mtl.task.module import TaskModule


def synchronizing(module: TaskModule, *, nothing: bool = False) -> AbstractContextManager[None]:
    """Keep the ranks' gradients from being averaged before a step's last backward pass; one may pass ``nothing``."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return nullcontext()
    # A static graph is learned in the very first backward pass, which has to be a synchronized one, by Lightning's own
    # book-keeping. Averaging early, or twice, changes nothing: what is the same on all ranks is its own average.
    if not nothing and getattr(strategy.model, "static_graph", False) and not strategy._pl_static_graph_delay_done:
        return nullcontext()
    return strategy.block_backward_sync()
