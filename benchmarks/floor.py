"""Each way of weighting over plain training or the cost of rows, as K, the model and the batch grow.

    python -m benchmarks.floor                        # 12 minutes on a free core, up to 100 million parameters
    python -m benchmarks.floor --quick                # 3 minutes, up to 3 million
    python -m benchmarks.floor --json PATH --png PATH # goes on where it was stopped

What each is compared with is that of ``step_time.py``: plain training where losses alone are weighed or gradients are
taken at the features; K gradients of the last layer more; or K - 1 backward passes of the trunk more, the cost of rows.
No step has to stay above these: at the trunk, a ratio below 1 means that the step took less than K passes that compute
every task's gradient in full, which layers without rows do; anywhere else, that the rounds differ by more than the step
adds. An MLP throughout; what is not varied is 8 tasks, one million parameters and a batch of 128. The plot's upper row
shows a step and what it is compared with, the lower one their ratio; all axes are logarithmic.
"""

from __future__ import annotations

from benchmarks.step_time import Row, environment, evaluate, keep_freed_memory, run

# isort: split

import argparse
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cases import Case
from benchmarks.store import measured
from benchmarks.trunks import sized

TASKS, MILLIONS, BATCH = 8, 1, 128
SWEEPS: dict[str, tuple[int, ...]] = {
    "tasks": (2, 4, 8, 16, 40),
    "million parameters": (1, 3, 10, 30, 100),
    "batch": (32, 128, 512),
}
QUICK: dict[str, tuple[int, ...]] = {"tasks": (2, 8), "million parameters": (1, 3), "batch": (32, 128)}


def rows(num_tasks: int) -> list[Row]:
    return [
        Row("equal weights"),
        Row("UncertaintyWeighting"),
        Row("MGDA features"),
        Row("GradNorm last_layer", extra="layer gradient", count=num_tasks),
        Row("MGDA trunk", extra="trunk backward", count=num_tasks - 1),
    ]


def point(sweep: str, value: int, rounds: int, log_dir: str) -> list[dict[str, Any]]:
    setting = {"tasks": TASKS, "million parameters": MILLIONS, "batch": BATCH, sweep: value}
    name = f"{setting['million parameters']}M"
    models = {name: sized(setting["million parameters"])}
    steps = 6 if setting["million parameters"] <= 3 and setting["tasks"] <= 16 else 3
    small = setting["million parameters"] <= 30
    case = Case(name, setting["tasks"], steps, log_dir, models, setting["batch"], keeps_modules=small)
    wanted = rows(setting["tasks"])
    run(case, wanted, rounds)
    results = [{"sweep": sweep, "value": value, "variant": row.variant, **evaluate(case, row)} for row in wanted]
    for result in results:
        low, high = result["quartiles"]
        print(
            f"{sweep:18} {value:4} {result['variant']:22} {result['step_ms']:9.2f} ms over {result['over_ms']:9.2f}"
            f" {result['ratio']:6.2f}  [{low:.2f}, {high:.2f}]",
            flush=True,
        )
    return results


def plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install matplotlib.") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    sweeps = list(dict.fromkeys(result["sweep"] for result in results))
    figure, grid = plt.subplots(
        2, len(sweeps), figsize=(4.2 * len(sweeps), 7), sharey="row", squeeze=False, layout="constrained"
    )
    for column, sweep in enumerate(sweeps):
        above, below = grid[0][column], grid[1][column]
        here = [result for result in results if result["sweep"] == sweep]
        for number, variant in enumerate(dict.fromkeys(result["variant"] for result in here)):
            found = [result for result in here if result["variant"] == variant]
            values, color = [result["value"] for result in found], f"C{number}"
            above.plot(values, [result["step_ms"] for result in found], "o-", color=color, label=variant)
            above.plot(values, [result["over_ms"] for result in found], ":", color=color)
            below.plot(values, [result["ratio"] for result in found], "o-", color=color)
            quartiles = [result["quartiles"] for result in found]
            below.fill_between(values, [q[0] for q in quartiles], [q[1] for q in quartiles], color=color, alpha=0.15)
        below.axhline(1, color="0.3", linewidth=0.8)
        ticks = sorted({result["value"] for result in here})
        for axes in (above, below):
            axes.set(xscale="log", yscale="log")
            axes.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.grid(alpha=0.3, which="both")
        below.yaxis.set(major_locator=FixedLocator([0.8, 0.9, 1, 1.2, 1.5, 2, 3]), minor_locator=NullLocator())
        below.yaxis.set_major_formatter(ScalarFormatter())
        below.set_xlabel(sweep)
    grid[0][0].set_ylabel("ms a step (dotted: what it is compared with)")
    grid[1][0].set_ylabel("ratio, half of the rounds shaded")
    grid[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two points a sweep")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns; 5, or 3 with --quick")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the figures there, point by point, and leave out what it has"
    )
    parser.add_argument("--again", action="store_true", help="measure what --json has, too: after a change of the code")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw them there")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 5)
    if rounds < 2:
        parser.error("--rounds must be at least 2, for a spread.")
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = {**environment(), "seed": 0, "rounds": rounds, "load_average": list(os.getloadavg())}
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    results = [] if options.again else measured(options.json, about)
    known = {(result["sweep"], result["value"]) for result in results}
    sweeps = QUICK if options.quick else SWEEPS
    todo = [(sweep, value) for sweep, values in sweeps.items() for value in values if (sweep, value) not in known]
    if known:
        print(f"{len(known)} points are known from {options.json}; --again measures them.")
    with tempfile.TemporaryDirectory() as log_dir:
        for sweep, value in todo:
            results += point(sweep, value, rounds, log_dir)
            if options.json:
                options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    if options.png:
        title = f"{about['machine']['processor']}, torch {about['versions']['torch']}, one thread, {about['date'][:10]}"
        plot(results, title, options.png)
    print(f"median of all ratios: {statistics.median(result['ratio'] for result in results):.2f}")


if __name__ == "__main__":
    main()
