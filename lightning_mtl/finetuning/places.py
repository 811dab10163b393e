"""Where in a checkpoint a trunk's weights lie: below which entry, and below which prefix of its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mtl.finetuning.reading import some

# What torch.compile, FSDP, activation checkpointing and peft, around a model and around a layer, put into keys.
_WRAPPERS = re.compile(
    r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|base_model\.model\.|base_layer\.(?=[^.]+$)"
)
_DEEPEST = 3  # how deep state dicts lie in a checkpoint: {"ema": {"model": ...}}
EXTRA_STATE = "_extra_state"  # a key's end, as torch has it


def unwrapped(key: str) -> str:
    """Return a key of a state dict without what wrappers have put into it.

    Example:
        >>> unwrapped("trunk._orig_mod.0.weight")
        'trunk.0.weight'
    """
    return _WRAPPERS.sub("", key)


def entries(source: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return every state dict in a checkpoint by its path, ``""`` for the checkpoint itself, keys without wrappers.

    Raises:
        ValueError: If it holds none.
    """
    found = dict(_entries(source, "", _DEEPEST))
    if not found:
        raise ValueError(f"load_trunk found no tensors in {name}; its keys are {some(map(str, source))}.")
    return found


def _entries(source: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    own = {
        unwrapped(key): value
        for key, value in source.items()
        if isinstance(key, str) and (isinstance(value, Tensor) or key.endswith(EXTRA_STATE))
    }
    if any(isinstance(value, Tensor) for value in own.values()):
        yield path, own
    for key, value in source.items() if depth else ():
        below = value.state_dict() if isinstance(value, nn.Module) else value
        if isinstance(key, str) and isinstance(below, Mapping) and not key.endswith(EXTRA_STATE):
            yield from _entries(below, f"{path}.{key}".removeprefix("."), depth - 1)


@dataclass(frozen=True)
class Place:
    """A prefix of an entry's keys, and how the trunk fits below it.

    Attributes:
        entry: The entry's path.
        prefix: The prefix.
        named: How many of the trunk's keys are there.
        fitting: How many of them have the trunk's shape.
        is_whole: Whether all of the trunk is there, or nothing that is not the trunk's.
    """

    entry: str
    prefix: str
    named: int
    fitting: int
    is_whole: bool

    @property
    def is_trunk(self) -> bool:
        """Whether it is called so; a part wrapped for several devices has one name more."""
        whole = f".{self.entry}.{self.prefix}" if self.entry else f".{self.prefix}"
        return whole.rstrip(".").removesuffix(".module").endswith(".trunk")

    def described(self, number: int, *, by_key: bool) -> str:
        """The arguments that name the place, and how much of a trunk of so many keys is there."""
        arguments = [f"key={self.entry!r}"] if by_key else []
        return f"{', '.join([*arguments, f'prefix={self.prefix!r}'])} ({self.fitting} of the trunk's {number} tensors)"

    def is_inside(self, other: Place) -> bool:
        """Whether it is a part of what another place has more of."""
        return self.entry == other.entry and self.prefix.startswith(other.prefix) and self.named < other.named


def find_place(
    found: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], *, key: str | None, prefix: str | None, name: str
) -> Place:
    """Find where the trunk lies: in a place called ``trunk``, or in the only one that it fits.

    Args:
        found: What :func:`entries` returned.
        own: The trunk's state dict, keys without wrappers.
        key: The entry's path, if it is known.
        prefix: The prefix, likewise.
        name: The source, for messages.

    Raises:
        ValueError: If there is none, or several are possible; it lists them.
    """
    if key is not None and key not in found:
        raise ValueError(f"load_trunk(key={key!r}) is no state dict of {name}; it holds {[*found]}.")
    wanted = {key: found[key]} if key is not None else found
    if prefix is not None:
        prefix = unwrapped(prefix)
        places = [_place(entry, prefix, tensors, own) for entry, tensors in wanted.items()]
        places = [place for place in places if place.named] or places[:1]
    else:
        places = [place for entry, tensors in wanted.items() for place in _places(entry, tensors, own)]
    if not places:
        raise ValueError(
            f"load_trunk found no key of the trunk in {name}, whatever the prefix: the trunk has {some(own)}, the "
            f"source {some(key for tensors in wanted.values() for key in tensors)}. Build the trunk as it was when it "
            "was saved."
        )
    places = [place for place in places if place.is_trunk] or places
    places = [place for place in places if not any(place.is_inside(other) for other in places)]
    meant = [place for place in places if place.is_whole] or [place for place in places if place.fitting]
    if not meant:  # the report will say so
        return max(places, key=lambda place: place.named)
    if len(meant) > 1:
        listed = [place.described(len(own), by_key=len(wanted) > 1) for place in meant]
        raise ValueError(
            f"load_trunk may mean {len(meant)} places of {name}: {some(listed, '; ')}. Say which one, as in "
            f"load_trunk(..., {listed[0].partition(' (')[0]})."
        )
    return meant[0]


def _places(entry: str, tensors: Mapping[str, Any], own: Mapping[str, Any]) -> list[Place]:
    prefixes = {
        key[:start]: None
        for key in tensors
        for start in [0, *(place + 1 for place, letter in enumerate(key) if letter == ".")]
        if key[start:] in own
    }
    return [_place(entry, prefix, tensors, own) for prefix in prefixes]


def _place(entry: str, prefix: str, tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Place:
    below = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    named = [key for key in below if key in own]
    fitting = [key for key in named if fits(tensors[prefix + key], own[key])]
    # Tied parameters are there if one of their names is.
    is_complete = {id(own[key]) for key in fitting} == {id(value) for value in own.values()}
    return Place(entry, prefix, len(named), len(fitting), is_complete or len(fitting) == len(below) > 0)


def fits(value: Any, own: Any) -> bool:  # noqa: ANN401 - tensors and whatever extra state is
    """Whether a value of a checkpoint has the form of the trunk's: a lazy parameter takes any shape."""
    if not isinstance(own, Tensor) or not isinstance(value, Tensor):
        return isinstance(own, Tensor) == isinstance(value, Tensor)
    return is_lazy(own) or own.shape == value.shape
