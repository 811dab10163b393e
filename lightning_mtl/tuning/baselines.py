"""The single-task models that ``val/delta_m`` compares with, trained once for a study."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtl.configured import ConfigurationError, MultiTaskCLI
from lightning_mtl.method.base import Weighting
from lightning_mtl.transfer import single_task_baselines
from lightning_mtl.transfer.configuration import digest
from lightning_mtl.tuning.configuration import Base, other_callbacks
from lightning_mtl.tuning.ranks import Ranks
from lightning_mtl.tuning.space import Space

BASELINES = "baselines"


def with_baselines(base: Base, space: Space, study: optuna.Study, folder: Path, ranks: Ranks) -> Base:
    """Put single-task scores into the configuration, where the objective is delta_m and it holds none.

    The first worker trains every task alone, with the configuration's own architecture and budget; its scores are kept
    in the study, for all workers and for when it is resumed.

    Raises:
        ConfigurationError: If the configuration does not list the tasks, so that no baseline can be put there.
    """
    wanted = any(metric.endswith("/delta_m") for goal in space.goals for metric in goal.metrics)
    if not wanted or any(task.baseline for task in base.tasks.values()):
        return base
    listed = base.values["model"].get("init_args", {}).get("tasks")
    if not (isinstance(listed, dict) and listed.keys() == base.tasks.keys()):
        raise ConfigurationError(
            "objective delta_m compares with single-task scores, and the configuration lists no tasks to put them "
            "into: give the module's tasks a Task(baseline=...)."
        )
    means = ranks.broadcast(study.user_attrs.get(BASELINES))
    if means is None:
        means = ranks.broadcast(_trained(base, folder))
        if ranks.leads:
            # Of two workers that trained at once, the first one's count for both.
            means = study.user_attrs.get(BASELINES) or means
            study.set_user_attr(BASELINES, means)
        means = ranks.broadcast(means)
    return base.with_baselines(means)


def _trained(base: Base, folder: Path) -> dict[str, dict[str, float]]:
    values = deepcopy(dict(base.values))
    values["seed_everything"] = base.seed
    # A weighting has nothing to weigh in a task alone, and scores are what is kept of it.
    values["trainer"].update(
        callbacks=other_callbacks(values, Weighting, ModelCheckpoint),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    parts = _Parts(values)
    found = single_task_baselines(
        lambda seed: parts.take("model"),
        lambda seed: parts.take("datamodule"),
        lambda: parts.take("trainer"),
        seeds=(base.seed,),
        cache_dir=folder / "baselines",
        key=digest(values),
    ).means()
    return {
        task: {metric: value for metric, value in scores.items() if value != 0 and math.isfinite(value)}
        for task, scores in found.items()
    }


class _Parts:
    """Model, data and Trainers from a configuration. The parser makes all three at once; each is handed out once.

    Args:
        values: The configuration.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.unused: dict[str, Any] = {}

    def take(self, part: str) -> Any:  # noqa: ANN401 - the caller knows which it asked for
        """A model, datamodule or Trainer that nobody has used."""
        if part not in self.unused:
            cli = MultiTaskCLI(deepcopy(self.values), run=False, exit_on_error=False)
            self.unused = {"model": cli.model, "datamodule": cli.datamodule, "trainer": cli.trainer}
        return self.unused.pop(part)
