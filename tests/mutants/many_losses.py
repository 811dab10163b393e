"""Slips in what is shared, in control for each task, and in comparisons."""

from __future__ import annotations

from tests.mutants.mutation import Mutation

STOPPED = "tests/control/test_stopped_tasks.py"
CONTROL_RANKS = "tests/control/test_ranks.py"
BALANCED = "tests/balanced"
COMPARING = "tests/tuning/comparing"

MANY_LOSSES = (
    Mutation(
        "ranks keep what they know of sharing to themselves",
        "training/sharing.py",
        "if window.ranks.sum(numbers([float(news)], device)):",
        "if False:",
        f"{BALANCED}/test_ranks.py",
    ),
    Mutation(
        "a second task's visit to a node is not followed",
        "gradients/graph.py",
        "elif visitor != task and node not in twice:",
        "elif False:",
        f"{BALANCED}/test_steps.py",
    ),
    Mutation(
        "gradients kept before a parameter was known to be shared are lost",
        "gradients/trunk.py",
        "known.update((parameter, own.pop(parameter)) for parameter in shared if parameter in own)",
        "[own.pop(parameter, None) for parameter in shared]",
        f"{BALANCED}/test_fits.py",
    ),
    Mutation(
        "a head that trains alone has this rank's share once",
        "training/resting.py",
        "else shares * ranks.size",
        "else shares",
        CONTROL_RANKS,
    ),
    Mutation(
        "the scaler's factor stays in heads that train alone",
        "training/resting.py",
        "factor = unscaled(outer, scale)",
        "factor = outer",
        STOPPED,
    ),
    Mutation(
        "a task rests although its score improves",
        "control/early_stopping.py",
        "improved = gain > of_task",
        "improved = -gain > of_task",
        "tests/control/test_early_stopping.py",
    ),
    Mutation(
        "the scaler's factor stays in a kernel's trace",
        "gradients/beside.py",
        "norm = norm.to(total) if scale is None else norm.to(total) / scale.to(total)",
        "norm = norm.to(total)",
        "tests/weighting/test_physics.py",
        "kernel_traces",
    ),
    Mutation(
        "renewed rows are this rank's share alone",
        "gradients/beside.py",
        "    rows.sum_over(batch.ranks)\n",
        "",
        "tests/weighting/test_physics.py",
        "two_ranks",
    ),
    Mutation(
        "a temperature sharpens the shares",
        "data/adaptive.py",
        "/ largest) ** (1 / temperature)",
        "/ largest) ** temperature",
        "tests/control/test_adaptive.py",
    ),
    Mutation(
        "p-values are not corrected for the number of rows",
        "paired.py",
        "(len(p_values) - rank) * p_values[place]",
        "p_values[place]",
        "tests/test_paired.py",
    ),
    Mutation(
        "a regression is compared in the units that it was standardized by",
        "tuning/comparing/raw_units.py",
        'RAW_LOSS if metric == "loss" and task in changes else metric',
        "metric",
        f"{COMPARING}/test_raw_units.py",
    ),
)
