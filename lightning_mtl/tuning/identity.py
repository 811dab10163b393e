"""The identity of a study: everything that its objective depends on, and what differs when it is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_mtl.transfer.values import class_name, digest_of
from lightning_mtl.tuning.configuration import BaseConfig
from lightning_mtl.tuning.goals import Direction
from lightning_mtl.tuning.space import Space

QUESTION = "question"  # the study's user attribute
SEEDS = "seeds"
SHOWN = 3


def identity_of(base: BaseConfig, space: Space, directions: Sequence[Direction], seeds: int) -> dict[str, int | str]:
    """Note what a trial's value depends on: number of seeds, goals, space, configuration and number of processes.

    Returns:
        ``{name: value}``, a digest but for the seeds; storages hold it as JSON.
    """
    parts: dict[str, Any] = {
        "objective": [[goal.metrics, direction] for goal, direction in zip(space.goals, directions, strict=True)],
        "importance": space.simplex,
        "weighting": [
            [class_name(own.method), sorted(own.fixed.items()), sorted(own.space.items())] for own in space.weightings
        ],
        "number of processes": base.world_size,
    }
    parts |= {f"parameters.{path}": allowed for path, allowed in space.parameters.items()}
    parts |= dict(_leaves(base.values, ""))
    return {SEEDS: seeds, **{name: digest_of(part)[:12] for name, part in parts.items()}}


def _leaves(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def differences(begun: object, asked: Mapping[str, int | str]) -> str | None:
    """Say in a phrase how a study was begun otherwise than it is asked for now; None where it was not.

    Args:
        begun: What the study holds.
        asked: The identity of this search.

    Example:
        >>> differences({"seeds": 1, "trainer.max_epochs": "a"}, {"seeds": 3, "trainer.max_epochs": "b"})
        'with --seeds 1, not 3, and with another configuration or space (trainer.max_epochs)'
    """
    if not isinstance(begun, Mapping):
        return "by an earlier version, which did not note the number of seeds"
    found = [f"with --seeds {begun.get(SEEDS)}, not {asked[SEEDS]}"] if begun.get(SEEDS) != asked[SEEDS] else []
    names = sorted(name for name in {*begun, *asked} - {SEEDS} if begun.get(name) != asked.get(name))
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found.append(f"with another configuration or space ({', '.join(names[:SHOWN])}{more})")
    return ", and ".join(found) or None
