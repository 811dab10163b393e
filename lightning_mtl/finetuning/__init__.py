"""Fine-tuning: a trained trunk for other tasks, unfrozen step by step, and exported predictions."""

from lightning_mtl.finetuning.checkpoints import LoadReport, LoadTrunk, load_trunk
from lightning_mtl.finetuning.exporting import export
from lightning_mtl.finetuning.tasks import add_task, drop_task
from lightning_mtl.finetuning.unfreezing import GradualUnfreezing

__all__ = ["GradualUnfreezing", "LoadReport", "LoadTrunk", "add_task", "drop_task", "export", "load_trunk"]
