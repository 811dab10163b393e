"""Trunks as Hugging Face writes them: keywords in; a dataclass that is a dict and, by number, a tuple out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BertConfig, BertModel

from lightning_mtl import MultiTaskModule, Task
from tests.plain import momentum
from tests.test_users_bring import WAYS
from tests.training import fit, loader


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """What ``transformers`` returns: a dataclass, a dict without what is None, and a tuple by number."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: Any = None

    def __post_init__(self) -> None:
        first, *others = (getattr(self, field.name) for field in fields(self))
        if isinstance(first, dict) and all(other is None for other in others):
            for name, value in first.items():
                setattr(self, name, value)
            return
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self[name] for name in self.keys())[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() or (isinstance(getattr(self, "last_hidden_state", None), dict) and value is not None):
            super().__setitem__(name, value)
        super().__setattr__(name, value)


class Encoder(nn.Module):
    def __init__(self, *, frozen_embedding: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.pooler = nn.Linear(6, 6)
        self.embedding.requires_grad_(not frozen_embedding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool = True) -> ModelOutput:
        embedded = self.embedding(input_ids)
        hidden = self.layer(embedded, src_key_padding_mask=attention_mask == 0)
        return ModelOutput(hidden, torch.tanh(self.pooler(hidden[:, 0])), (embedded, hidden))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 3)

    def forward(self, output: ModelOutput) -> Tensor:
        result: Tensor = self.classifier(output.pooler_output)
        return result


class Tagger(nn.Module):
    """Reads by name and by number, the states of other layers among it."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(12, 1)

    def forward(self, output: ModelOutput) -> Tensor:
        states = torch.cat([output["last_hidden_state"], output.hidden_states[0]], dim=-1)
        assert torch.equal(output[0], output.last_hidden_state)
        result: Tensor = self.classifier(states).squeeze(-1)
        return result


def texts() -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for length in (5, 7, 4):
        ids = torch.randint(20, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        targets = {
            "topic": torch.randint(3, (4,), generator=generator),
            "tags": torch.randn(4, length, generator=generator),
        }
        found.append(({"input_ids": ids, "attention_mask": mask}, targets))
    return found


def bert(*, frozen_embedding: bool) -> nn.Module:
    """The library's own, small and built from a configuration."""
    config = BertConfig(
        vocab_size=20,
        hidden_size=6,
        intermediate_size=8,
        max_position_embeddings=7,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        output_hidden_states=True,
    )
    encoder = BertModel(config)
    encoder.embeddings.requires_grad_(not frozen_embedding)
    return encoder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("encoder", [Encoder, bert])
def test_every_way_trains_it(way: str, frozen: bool, encoder: Callable[..., nn.Module]) -> None:
    torch.manual_seed(3)
    module = MultiTaskModule(
        encoder(frozen_embedding=frozen),
        {"topic": Pooled(), "tags": Tagger()},
        {"topic": Task(cross_entropy), "tags": Task(mse_loss)},
        optimizer=momentum,
    )
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    trainer = fit(module, loader(*texts()), loader(*texts()), callbacks=WAYS[way]())
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not (frozen and "embedding" in name)}
    assert trainer.callback_metrics["val/loss/tags"].isfinite()
    assert set(module(texts()[0][0])) == {"topic", "tags"}
