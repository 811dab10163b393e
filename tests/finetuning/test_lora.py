"""Adapters of the peft library train under a weighting, and nothing else of the trunk does."""

from __future__ import annotations

import pytest
import torch

import lora


# What peft and its dependencies say of themselves.
@pytest.mark.filterwarnings("ignore")
def test_the_adapters_train_alone() -> None:
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in lora.build().named_parameters()}
    after = dict(lora.main(max_steps=3).named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name or name.startswith("heads")}
