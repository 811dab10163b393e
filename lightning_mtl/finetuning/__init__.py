"""Using a trained model for more: its trunk for other tasks, thawed step by step, and its predictions elsewhere."""

from lightning_mtl.finetuning.unfreezing import GradualUnfreezing

__all__ = ["GradualUnfreezing"]
