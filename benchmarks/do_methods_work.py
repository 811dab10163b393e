"""Do the methods work? Every row trained on real data with the same budget, a learning rate of its own, and five seeds.

    python -m benchmarks.do_methods_work                                  # MultiDigits: scikit-learn's scans
    python -m benchmarks.do_methods_work --data tox21 --data-dir FOLDER   # or multimnist, adult
    python -m benchmarks.do_methods_work --only MGDA PCGrad --seeds 3     # a part; --full: all methods

It is ``lightning_mtl.tuning.compare`` on these data: see docs/compare.md for how rows are chosen and compared. A seed
decides how the data are divided, the first weights and the order of the batches, and does so alike for all rows.
Started again it goes on where it was; started several times, it shares the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.method_rows import LEFT_OUT, NAMED, REST, made_for, setup_of
from benchmarks.real_problems import PROBLEMS, TRAIN_BATCH, Problem, digits
from benchmarks.step_time import environment
from lightning_mtl.tuning import Comparison, compare
from lightning_mtl.tuning.comparing.words import verdict
from program import quieten

DRAWS = 5  # sets of fixed weights
FILE_WIDTH = 160  # columns of a table that goes to a file, where no terminal says how many there are


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["multidigits", *PROBLEMS], help="default: multidigits")
    folder = os.environ.get("LIGHTNING_MTL_DATA")
    parser.add_argument("--data-dir", type=Path, default=Path(folder) if folder else None, help="for the other data")
    parser.add_argument("--full", action="store_true", help="all methods; default: eleven rows of ten")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these methods, beside equal weights")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, help="of a training; default: what the data have")
    parser.add_argument("--lrs", type=float, nargs="+", metavar="LR", help="to choose from; default: the data's three")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args(argv)
    options.data = options.data or "multidigits"
    if options.data != "multidigits" and options.data_dir is None:
        parser.error(f"--data {options.data} needs --data-dir, the folder with its files")
    for name in options.only:
        if name in LEFT_OUT:
            parser.error(f"--only {name}: {LEFT_OUT[name]}")
        if name not in {**NAMED, **REST}:
            parser.error(f"--only {name}: choose from {', '.join([*NAMED, *REST])}")
    if options.seeds < 1 or (options.steps is not None and options.steps < 2):
        parser.error("--seeds must be at least 1 and --steps at least 2")
    return options


def main(argv: Sequence[str] | None = None) -> Comparison:
    options = parse(argv)
    quieten()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    try:
        problem = digits() if options.data == "multidigits" else PROBLEMS[options.data](options.data_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"do_methods_work.py: {error}") from error
    problem = replace(
        problem, steps=options.steps or problem.steps, learning_rates=tuple(options.lrs or problem.learning_rates)
    )
    wanted = {**NAMED, **(REST if options.full or options.only else {})}
    if options.only:
        wanted = {name: make for name, make in wanted.items() if name in options.only}
    name = f"do_methods_work_{problem.name.lower()}{'_full' if options.full else ''}"
    result = compare(
        setup_of(problem),
        methods=made_for(problem, wanted),
        rows=["single", "fixed"],
        seeds=options.seeds,
        lrs=problem.learning_rates,
        draws=DRAWS,
        metrics=[problem.metric],
        name=f"{problem.name}, {problem.steps} steps",
        folder=options.results / name,
    )
    result.print_table(console)
    for line in against_the_literature(result):
        console.print(line, soft_wrap=True, markup=False)
    result.figure().savefig(options.results / f"{name}.png", dpi=120)
    write_json(problem, result, options.results / f"{name}.json")
    return result


def against_the_literature(result: Comparison) -> list[str]:
    """How this goes with what others have found."""
    learned = [row.name for row in result.rows if row.name in {**NAMED, **REST}]
    ahead = [
        name
        for name in learned
        if (one := result.against_equal.get(name)) is not None and one.significant and one.interval.mean < 0
    ]
    return [
        "Their papers report each of these methods ahead of equal weights, most on larger data and models than these.",
        (
            "Kurin et al. (2022, arXiv:2201.04122) and Xin et al. (2022, arXiv:2209.11379) find that none beats the "
            f"plain sum, or fixed weights, once these are tuned as carefully. Here {len(ahead)} of {len(learned)} are "
            f"significantly better than equal weights{': ' + ', '.join(ahead) if ahead else ''}."
        ),
    ]


def write_json(problem: Problem, result: Comparison, path: Path) -> None:
    """Write where and how it ran, what it says, and all numbers; None is what is not a number."""
    columns, records = result.records()
    about = {
        **environment(),
        "data": problem.name,
        "tasks": problem.tasks,
        "metric": problem.metric,
        "steps": problem.steps,
        "batch": TRAIN_BATCH,
        "seeds": result.seeds,
        "learning_rates": problem.learning_rates,
        "left_out": LEFT_OUT,
        "verdict": [*verdict(result), *against_the_literature(result)],
    }
    found = [dict(zip(columns, map(_finite, record), strict=True)) for record in records]
    path.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
