"""Fine-tune a trunk through low-rank adapters of the peft library, under a weighting: nothing has to be adapted.

    pip install peft && python examples/lora.py

``inject_adapter_in_model`` freezes the trunk and puts adapters into its layers; weightings measure the gradients of
what trains, the adapters. The tasks are made up; prints which share of the trunk's parameters trained.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import l1_loss
from torch.utils.data import DataLoader, StackDataset

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.weighting import MGDA

TASKS = ("age", "height")


def build() -> MultiTaskModule:
    """A model whose trunk was trained elsewhere, say, with adapters of rank 4 in both of its layers."""
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"]), trunk)
    return MultiTaskModule(trunk, {task: nn.Linear(32, 1) for task in TASKS}, {task: Task(l1_loss) for task in TASKS})


def main(max_steps: int = 50) -> MultiTaskModule:
    torch.manual_seed(0)
    model = build()
    targets = StackDataset(**{task: torch.rand(256, 1) for task in TASKS})  # type: ignore[arg-type]  # as torch's docs
    images = torch.randn(256, 64)
    data = DataLoader(StackDataset(images, targets), batch_size=32, shuffle=True)  # type: ignore[arg-type]
    pl.Trainer(max_steps=max_steps, callbacks=[MGDA()], logger=False, enable_checkpointing=False).fit(model, data)
    trained = sum(p.numel() for p in model.trunk.parameters() if p.requires_grad)
    print(f"{trained} of {sum(p.numel() for p in model.trunk.parameters())} parameters of the trunk trained.")
    return model


if __name__ == "__main__":
    main()
