"""The parts of MTAN's attention: masks, and what passes masked features on to the next stage."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, interpolate

Layout: TypeAlias = Literal["maps", "tokens"]
"""How features lie in a tensor: ``"maps"`` are ``[B, C, H, W]``, ``"tokens"`` ``[B, ..., C]``."""


def check_layout(layout: Layout) -> Layout:
    """Check a layout.

    Raises:
        ValueError: If it is unknown.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"MTAN(layout={layout!r}) must be 'maps' for [B, C, H, W] or 'tokens' for [B, T, C].")
    return layout


def projection(layout: Layout, inputs: int, outputs: int, kernel: int = 1) -> list[nn.Module]:
    """A linear map of the channels and a norm that suits the layout; tokens are mapped one by one."""
    if layout == "maps":
        # The norm takes out any bias.
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return [nn.Linear(inputs, outputs), nn.LayerNorm(outputs)]


class AttentionMask(nn.Sequential):
    """g and h: two maps of the channels, with a ReLU between them and a sigmoid at the end."""

    def __init__(self, layout: Layout, inputs: int, outputs: int) -> None:
        super().__init__(
            *projection(layout, inputs, outputs), nn.ReLU(), *projection(layout, outputs, outputs), nn.Sigmoid()
        )


class Passing(nn.Sequential):
    """f: brings masked features to the channels of the next stage; for maps with a 3x3 convolution."""

    def __init__(self, layout: Layout, inputs: int, outputs: int) -> None:
        super().__init__(*projection(layout, inputs, outputs, kernel=3), nn.ReLU())


def resize_maps(maps: Tensor, like: Tensor) -> Tensor:
    """Bring maps to another's height and width: by max pooling where they shrink, bilinearly where they grow."""
    size = list(like.shape[-2:])
    if list(maps.shape[-2:]) == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return adaptive_max_pool2d(maps, size)
    return interpolate(maps, size, mode="bilinear", align_corners=False)
