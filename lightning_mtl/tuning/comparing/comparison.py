"""Runs a comparison: from a configuration or functions to a study, and from its outcomes to the result's files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch.utilities.seed import isolate_rng
from optuna.trial import TrialState

from lightning_mtl.configured import ConfigurationError
from lightning_mtl.task import Task
from lightning_mtl.transfer.cache import write_whole
from lightning_mtl.transfer.finished import Directions
from lightning_mtl.transfer.progress import Progress, quiet
from lightning_mtl.transfer.runs import metric_directions
from lightning_mtl.tuning.addresses import without_passwords
from lightning_mtl.tuning.comparing import queue
from lightning_mtl.tuning.comparing.page import write_page
from lightning_mtl.tuning.comparing.plan import Line, Plan, Training, rates_around
from lightning_mtl.tuning.comparing.queue import Known, Worker
from lightning_mtl.tuning.comparing.raw_units import in_raw_units
from lightning_mtl.tuning.comparing.result import Comparison, RowOutcome
from lightning_mtl.tuning.comparing.rows import DEFAULT_METHODS, EQUAL, SHORT, Methods, Row, read_rows
from lightning_mtl.tuning.comparing.setups import ConfigSource, Setup, SetupSource, Source
from lightning_mtl.tuning.configuration import read_base
from lightning_mtl.tuning.identity import open_study
from lightning_mtl.tuning.storage import fail_and_repeat, open_storage
from lightning_mtl.tuning.trial import TrialProcesses


def compare(
    config: str | Path | Mapping[str, Any] | Setup,
    *,
    methods: Methods = DEFAULT_METHODS,
    rows: Sequence[str] = tuple(SHORT),
    seeds: int = 5,
    lrs: Sequence[float] | None = None,
    lr_path: str | None = None,
    seed_path: str | None = None,
    draws: int = 4,
    metrics: Sequence[str] | None = None,
    storage: str | Path | None = None,
    name: str = "comparison",
    folder: str | Path | None = None,
    timeout: float | None = None,
    silence: int = 60,
    retry_running: bool = False,
    retry_failed: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Comparison:
    """Compare single-task models, equal and fixed weights, scales and methods on your own data; joins or resumes.

    Every row gets the same budget, and a learning rate of its own from the same few: the one with the least mean
    relative regret over tasks and metrics on validation data, by a seed that is there for the choice alone. A choice at
    the edge of the grid widens it, three times at most. Then all rows train with the same seeds, and are compared seed
    by seed by their scores after the last step: on test data, or on validation data where there are none.

    Methods, rows and seeds can be added later under the same name: what has been trained counts.

    Args:
        config: A file as ``lightning-mtl fit`` takes it, its content, or a :class:`Setup` of functions.
        methods: Weighting methods: names, ``{"class_path": ..., "init_args": ...}``, or a mapping ``{name: method}``,
            whose methods may also be functions that return a weighting. The configuration's weighting is a row, too.
        rows: The other rows: ``"single"``, ``"equal"`` (always there), ``"standardized"``, ``"initial"`` (1 / L(0)) and
            ``"fixed"``.
        seeds: How many seeds are compared. The configuration's own seed chooses; those after it are compared.
        lrs: The learning rates to choose from; None takes three around the configuration's, a factor of the root of 10
            apart. One is taken as it is.
        lr_path: Where the configuration's learning rate is; None takes ``model.optimizer.lr``.
        seed_path: Where a seed goes in the configuration besides ``seed_everything``, such as ``data.seed``: a seed
            then divides the data, too.
        draws: How many sets of fixed weights, uniform on the simplex, there are to choose from.
        metrics: Names of metrics to compare, ``"loss"`` possibly among them; None takes each task's metrics, or its
            loss if it has none; that of a regression in the targets' own units, ``"raw_loss"``.
        storage: Where workers meet, as in :func:`~lightning_mtl.tuning.tune`; None takes an SQLite file in the folder.
        name: The study's name in the storage.
        folder: Where table, picture and page go; None takes the study's name.
        timeout: Begin no training after so many seconds.
        silence: Seconds without a sign of life after which a worker is taken for dead and its training repeated.
        retry_running: Repeat the trainings that are running: for a journal file whose workers were killed.
        retry_failed: Repeat the trainings that ended with an error; else their rows stay without numbers.
        overrides: Further arguments for the configuration, as on the command line.
        progress: Say on standard error which training runs.

    Raises:
        ConfigurationError: If something given is wrong or does not go together, equal weights cannot be trained, the
            study was begun with another configuration, or torchrun has started several processes.

    Example:
        >>> result = compare("run.yaml", methods=["FAMO"], seeds=5)  # doctest: +SKIP
        >>> result.print_table()  # doctest: +SKIP
    """
    for argument, value in (("seeds", seeds), ("silence", silence)):
        if value < 1:
            raise ConfigurationError(f"{argument}={value} must be at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "compare trains each model on one process, and torchrun has started several; start the same command "
            "several times without torchrun: the workers share the trainings."
        )
    folder = Path(name if folder is None else folder)
    with isolate_rng(), quiet(), ExitStack() as undo:
        source = _source(config, lr_path, seed_path, overrides)
        if len(source.tasks) < 2:
            raise ConfigurationError(f"there is nothing to weigh with one task; found {list(source.tasks)}.")
        made, left_out = read_rows(source.tasks, rows, methods, draws, source.own_methods())
        made, directions = in_raw_units(source.tasks, _directions(source.tasks, metrics), made)
        counted = main_tasks(source.tasks)
        plan = make_plan(source, made, directions, counted, _rates(lrs, source.rate), seeds)
        if storage is None:
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / 'study.db'}"
        # Of errors the result tells, of trials the display.
        undo.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        opened = open_storage(storage, silence)
        sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()
        study = open_study(opened, name, ["minimize"], source.identity(), TrialProcesses(1), sampler, pruner)
        if retry_running:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                fail_and_repeat(study, trial)
        if retry_failed:
            queue.retry_failed(study)
        shown = undo.enter_context(Progress("compare", 0, show=progress))
        worker = Worker(study, opened, source, {row.key: row for row in made}, plan, silence, shown, directions)
        known = worker.known()
        if progress:
            sys.stderr.write(_announcement(study.study_name, str(storage), plan, made, left_out, known, folder))
        worker.work(timeout)
        known = worker.known()
    result = gather(plan, made, known, directions, counted, left_out)
    return write_files(
        result,
        folder,
        about=config.name if isinstance(config, Path) else str(config) if isinstance(config, str) else "",
    )


def _source(
    config: str | Path | Mapping[str, Any] | Setup,
    lr_path: str | None,
    seed_path: str | None,
    overrides: Sequence[str],
) -> Source:
    if isinstance(config, Setup):
        if lr_path is not None or seed_path is not None or overrides:
            raise ConfigurationError(
                "lr_path, seed_path and overrides are for configurations; a Setup's model takes the rate, its data the "
                "seed."
            )
        return SetupSource(config)
    return ConfigSource(read_base(config, overrides), lr_path, seed_path)


def _directions(tasks: Mapping[str, Task], metrics: Sequence[str] | None) -> Directions:
    try:
        return metric_directions(tasks, metrics)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _rates(lrs: Sequence[float] | None, rate: float) -> tuple[float, ...]:
    found = rates_around(rate) if lrs is None else tuple(sorted(lrs))
    if not found or found[0] <= 0 or len(set(found)) < len(found):
        raise ConfigurationError(f"lrs={list(found)} must be one or more learning rates above 0, each once.")
    return found


def main_tasks(tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """Return the tasks that count: the main ones where some are auxiliary, else all."""
    main = tuple(name for name, task in tasks.items() if task.role == "main")
    return main or tuple(tasks)


def make_plan(
    source: Source,
    rows: Sequence[Row],
    directions: Directions,
    counted: Sequence[str],
    rates: tuple[float, ...],
    seeds: int,
) -> Plan:
    """Lay out what is trained: a line for each row, and for each task of single tasks."""
    chosen_by = {task: directions[task] for task in counted}
    lines: list[Line] = []
    for row in rows:
        if row.alone:
            lines += [Line(row.key, {task: own}, task=task) for task, own in directions.items()]
        else:
            lines.append(Line(row.key, chosen_by, len(row.variants)))
    compared = tuple(range(source.seed + 1, source.seed + 1 + seeds))
    return Plan(tuple(lines), rates, source.seed, compared, EQUAL)


def _announcement(
    name: str, storage: str, plan: Plan, rows: Sequence[Row], left_out: Mapping[str, str], known: Known, folder: Path
) -> str:
    there, expected = len(known.scores), plan.expected(known.scores)
    done = sum(training.key in known.scores for training in plan.trainings(known.scores)) if there else 0
    said = [
        f"study {name!r} in {without_passwords(storage)}: {expected} trainings or a few more, {done} there already",
        (
            f"rows: {', '.join(row.name for row in rows)}; learning rates "
            f"{', '.join(f'{rate:g}' for rate in plan.rates)}; chosen by seed {plan.tuning_seed}, "
            f"compared by seeds {plan.seeds[0]} to {plan.seeds[-1]}"
        ),
        *(f"without {row}: {why}" for row, why in left_out.items()),
        f"table, picture and page go to {folder}/",
    ]
    return "".join(f"compare: {line}\n" for line in said)


def gather(
    plan: Plan,
    rows: Sequence[Row],
    known: Known,
    directions: Directions,
    counted: Sequence[str],
    left_out: Mapping[str, str],
) -> Comparison:
    """Put the outcomes of the study together, row by row."""
    wanted = plan.trainings(known.scores)
    compared = [training for training in wanted if training.purpose == "compare" and training.key in known.outcomes]
    outcomes = [known.outcomes[training.key] for training in compared]
    tested = bool(outcomes) and all(outcome.test is not None for outcome in outcomes)
    figures: Mapping[str, Any] = next(
        (known.outcomes[one.key].figures for one in wanted if one.purpose == "monitor" and one.key in known.outcomes),
        {},
    )
    return Comparison(
        tuple(_row_outcome(plan, row, known, compared, tested=tested) for row in rows),
        directions,
        tuple(counted),
        plan.seeds,
        "test" if tested else "val",
        dict(left_out),
        figures,
        len(plan.missing(known.scores)),
    )


def _row_outcome(plan: Plan, row: Row, known: Known, compared: Sequence[Training], *, tested: bool) -> RowOutcome:
    lines = [line for line in plan.lines if line.row == row.key]
    own = [training for training in plan.trainings(known.scores) if training.row == row.key]
    errors = [known.errors[one.key] for one in own if one.key in known.errors and one.purpose != "monitor"]
    choices = [
        (line, found.choice)
        for line, found in plan.searches(known.scores)
        if line.row == row.key and found.choice is not None
    ]
    # One candidate may fail, and another be chosen; of the compared trainings, none may.
    failed = errors and (
        any(choice.candidate is None for _, choice in choices)
        or any(one.key in known.errors for one in own if one.purpose == "compare")
    )
    if failed:
        return RowOutcome(row.name, {}, failed=errors[-1])
    scores: dict[int, Any] = {}
    seconds: dict[int, float] = {}
    for training in compared:
        if training.row == row.key:
            outcome = known.outcomes[training.key]
            scores.setdefault(training.seed, {}).update(outcome.test if tested and outcome.test else outcome.val)
            seconds[training.seed] = outcome.step_seconds
    complete = {seed: found for seed, found in scores.items() if len(lines) == 1 or len(found) == len(lines)}
    made = [(line, choice) for line, choice in choices if choice.candidate is not None]
    edges = tuple(
        f"the learning rate {'of ' + line.task + ' ' if line.task else ''}is the {choice.edge} of those tried "
        f"({', '.join(f'{rate:g}' for rate in choice.tried)})"
        for line, choice in made
        if choice.edge
    )
    candidates = [choice.candidate for _, choice in made if choice.candidate is not None]
    variant = row.variants[candidates[0].variant] if candidates else ""
    whole = len(made) == len(lines)
    rates = tuple(one.rate for one in candidates) if whole else ()
    at_edge = tuple(bool(choice.edge) for _, choice in made) if whole else ()
    return RowOutcome(row.name, complete, rates, variant, edges, seconds, at_edge=at_edge)


def write_files(result: Comparison, folder: Path, *, about: str = "") -> Comparison:
    """Write ``comparison.csv``, ``comparison.png`` and ``comparison.html`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    csv, picture, page = (folder / f"comparison.{ending}" for ending in ("csv", "png", "html"))
    result.to_csv(csv)
    result.figure().savefig(picture, dpi=130)
    write_whole(page, write_page(result, about=about))
    return replace(result, files=(csv, picture, page))
