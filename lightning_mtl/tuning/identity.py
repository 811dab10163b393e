"""The identity of a study: what its values depend on, and the refusal of another question under the same name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage

from lightning_mtl.configured import ConfigurationError
from lightning_mtl.transfer.values import class_name, digest_of
from lightning_mtl.tuning.configuration import BaseConfig
from lightning_mtl.tuning.goals import Direction
from lightning_mtl.tuning.space import Space
from lightning_mtl.tuning.trial import TrialProcesses

QUESTION = "question"  # the study's user attribute
SEEDS = "seeds"
SHOWN = 3
MOMENT = 2.0  # seconds


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
    parts |= dict(leaves(base.values, ""))
    return {SEEDS: seeds, **{name: digest_of(part)[:12] for name, part in parts.items()}}


def leaves(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    """Yield each value of a nested mapping with its path."""
    for key, value in values.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}.")
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
    found = [f"with --seeds {begun.get(SEEDS)}, not {asked.get(SEEDS)}"] if begun.get(SEEDS) != asked.get(SEEDS) else []
    names = sorted(name for name in {*begun, *asked} - {SEEDS} if begun.get(name) != asked.get(name))
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found.append(f"with another configuration or space ({', '.join(names[:SHOWN])}{more})")
    return ", and ".join(found) or None


def open_study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Direction],
    asked: Mapping[str, int | str],
    ranks: TrialProcesses,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> optuna.Study:
    """Create a study or load it; of several workers one creates it, and notes what it asks.

    Raises:
        ConfigurationError: If it was begun with another question.
    """
    if ranks.leads:
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), sampler=sampler, pruner=pruner
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            begun = time.monotonic()
            while QUESTION not in study.user_attrs and time.monotonic() - begun < MOMENT:
                time.sleep(MOMENT / 10)  # the worker that has created it just now is about to say this
        # The worker that created the study may have died, or lost its answer, before it could say this.
        if QUESTION not in study.user_attrs:
            study.set_user_attr(QUESTION, dict(asked))
    ranks.broadcast(None)  # the others load what rank 0 has made
    study = optuna.load_study(storage=storage, study_name=name, sampler=sampler, pruner=pruner)
    if said := differences(study.user_attrs.get(QUESTION, asked), asked):
        raise ConfigurationError(
            f"study {name!r} was begun {said}: trials of both would not be comparable; give this one another name "
            "(--name), or go back to what it was begun with."
        )
    return study
