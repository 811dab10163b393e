"""Do the methods work? Every row trained on real data with the same budget, a learning rate of its own, and five seeds.

    python -m benchmarks.do_methods_work                                  # MultiDigits: scikit-learn's scans
    python -m benchmarks.do_methods_work --data tox21 --data-dir FOLDER   # or multimnist, adult
    python -m benchmarks.do_methods_work --only MGDA PCGrad --seeds 3     # a part; --full: all methods

Each row gets the same number of steps and the same three learning rates to choose from, on validation data, by the
first two seeds; fixed weights are chosen from five sets in the same way. A seed decides how the data are divided, the
first weights and the order of the batches, and does so alike for all rows: so rows are compared seed by seed. Tested is
the model after the last step, on data that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.methods_report import Row, compared, rows_of, table, verdict, write
from benchmarks.real_problems import PROBLEMS, Problem, digits
from benchmarks.trials import NAMED, REST, SINGLE, STATIC, Method, Tuned, complete, shared_methods, tune
from program import quieten

TUNING_SEEDS = 2
FILE_WIDTH = 160  # columns of a table that goes to a file, where no terminal says how many there are


def run(problem: Problem, methods: Sequence[Method], options: argparse.Namespace, console: Console) -> dict[str, Tuned]:
    """Tune all rows, then train them seed by seed, so that what a row is compared with ran beside it."""
    seeds = range(options.seeds)
    searches = sum(len(method.makes) for method in methods) * len(problem.learning_rates)
    found: dict[str, Tuned] = {}
    with Progress(console=console, transient=True) as progress:
        tuning = seeds[:TUNING_SEEDS]
        bar = progress.add_task("tuning", total=searches * len(tuning))
        for method in methods:
            progress.update(bar, description=f"tuning {method.name}")
            told = lambda: progress.advance(bar)  # noqa: E731
            found[method.name] = tune(problem, method, tuning_seeds=tuning, told=told)
        bar = progress.add_task("other seeds", total=len(methods) * len(seeds))
        for seed in seeds:
            for method in methods:
                complete(problem, method, found[method.name], seed)
                progress.advance(bar)
    return found


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
    if unknown := [name for name in options.only if name not in {**NAMED, **REST, STATIC: None}]:
        parser.error(f"--only {' '.join(unknown)}: choose from {', '.join([STATIC, *NAMED, *REST])}")
    if options.seeds < 1 or (options.steps is not None and options.steps < 2):
        parser.error("--seeds must be at least 1 and --steps at least 2")
    return options


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = parse(argv)
    quieten()
    torch.set_num_threads(1)
    console, began = Console(highlight=False), time.process_time()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    try:
        problem = digits() if options.data == "multidigits" else PROBLEMS[options.data](options.data_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"do_methods_work.py: {error}") from error
    problem = replace(
        problem,
        steps=options.steps or problem.steps,
        learning_rates=tuple(options.lrs or problem.learning_rates),
    )
    methods = shared_methods(problem, {**NAMED, **(REST if options.full or options.only else {})})
    if options.only:
        methods = [methods[0], *(method for method in methods if method.name in options.only)]
    singles = [Method(f"{SINGLE} {task}", {"": lambda _: None}, task) for task in problem.tasks]
    trained = run(problem, [*singles, *methods], options, console)
    rows = rows_of(problem, trained, methods, TUNING_SEEDS)
    comparison = compared(rows)
    seconds = time.process_time() - began
    console.print(table(problem, rows, comparison), soft_wrap=True)
    for line in verdict(rows, comparison):
        console.print(line, soft_wrap=True)
    trainings = sum(len(row.searched) for row in rows) * min(TUNING_SEEDS, options.seeds)
    console.print(f"{trainings} trainings to choose, {seconds:.0f} s of processor time in all")
    paths = write(
        problem,
        rows,
        comparison,
        options.results,
        seconds=seconds,
        suffix="_full" if options.full else "",
    )
    console.print("written: " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return rows


if __name__ == "__main__":
    main()
