"""More trunks for the steps that benchmarks time: a small ResNet, a small transformer, MLPs of any size."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from benchmarks.step_cases import TRUNKS, Trunk


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm beside a short cut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        same = stride == 1 and channels_in == channels_out
        self.short_cut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.branch(inputs) + self.short_cut(inputs))


class MeanOverTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, stride=1),
        ResidualBlock(16, 32, stride=2),
        ResidualBlock(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def transformer() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False), MeanOverTokens())


def sized_mlp(num_parameters: int) -> nn.Sequential:
    """784 -> w -> w -> 256, with w such that there are about so many weights: w² + (784 + 256) w = P."""
    both = 784 + 256
    width = round((-both + math.sqrt(both**2 + 4 * num_parameters)) / 2)
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 256), nn.ReLU()
    )


def sized(millions: int) -> Trunk:
    return Trunk(functools.partial(sized_mlp, millions * 10**6), (128, 784), 4, 1.40)


PEER_TRUNKS = {
    "mlp": TRUNKS["mlp"],
    "resnet": Trunk(resnet, (32, 3, 16, 16), 5, 1.10),
    "transformer": Trunk(transformer, (32, 16, 64), 0, 1.10),
}
