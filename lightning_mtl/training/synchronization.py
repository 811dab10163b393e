"""When the ranks average their gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.strategies import DDPStrategy

from lightning_mtl.task.module import TaskModule


def synchronizing(module: TaskModule) -> AbstractContextManager[None]:
    """Keep the ranks' gradients from being averaged before a step's last backward pass."""
    strategy = module.trainer.strategy
    # Averaging early, or twice, changes nothing: what is the same on all ranks is its own average.
    if not isinstance(strategy, DDPStrategy) or learns_graph(module):
        return nullcontext()
    return strategy.block_backward_sync()


def learns_graph(module: TaskModule) -> bool:
    """Whether the coming backward pass is the one in which DDP learns a static graph, by Lightning's own book-keeping.

    It has to be a synchronized one, and to reach the parameters.
    """
    strategy = module.trainer.strategy
    if module.automatic_optimization or not isinstance(strategy, DDPStrategy):
        return False
    return getattr(strategy.model, "static_graph", False) and not strategy._pl_static_graph_delay_done
