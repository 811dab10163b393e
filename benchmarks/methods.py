"""What a step costs with every method, where it measures by default and at the features, over plain training.

    python -m benchmarks.methods                   # eight tasks on both trunks of step_time.py, five minutes
    python -m benchmarks.methods --only MGDA CAGrad --rounds 9 --json PATH

The same fits, clock and ratios as ``step_time.py``, which explains them and says what the ways of measuring are
compared with; here stand the methods beside each other. DTP runs with a metric on each task, and pays for it; the
methods for auxiliary tasks have one main task, and Frozen is timed once its weights are. PIVRG, which needs validation,
costs what FairGrad does.
"""

from __future__ import annotations

from benchmarks.step_time import environment, keep_freed_memory, step

# isort: split

import argparse
import functools
import json
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cases import TRUNKS, Case, Variant
from lightning_mtl import Aggregator, Weighting
from lightning_mtl import weighting as methods

NUM_TASKS = 8
METRIC = "MulticlassAccuracy"
MAKE: dict[str, Callable[[], Weighting]] = {
    "DTP": functools.partial(methods.DTP, METRIC, stage="train"),
    "CRMOGM": lambda: methods.CRMOGM(methods.MGDA()),
    "Frozen": lambda: methods.Frozen(methods.MGDA(), steps=2),
    "Rotating": lambda: methods.Rotating(methods.MGDA()),
}
WITH_A_MAIN_TASK = ("AuxiliaryCosine", "MetaBalance")
LEFT_OUT = ("FromTorchJD", "NTKWeighting", "PIVRG")


def variants() -> list[Variant]:
    """Every exported method by itself, and those that measure gradients at the features, too."""
    found = [Variant("plain", plain=True), Variant("equal weights")]
    for name in sorted(set(methods.__all__) - set(LEFT_OUT)):
        method = getattr(methods, name)
        if not (isinstance(method, type) and issubclass(method, Weighting)):
            continue
        arguments: dict[str, Any] = {"main": "task_0"} if name in WITH_A_MAIN_TASK else {}
        found.append(Variant(name, MAKE.get(name, functools.partial(method, **arguments)), metrics=name == "DTP"))
        if name not in MAKE and (method.measures in ("gramian", "norms") or issubclass(method, Aggregator)):
            found.append(Variant(f"{name} features", functools.partial(method, at="features", **arguments)))
    found.append(Variant("DBMTL(beta=0.9)", functools.partial(methods.DBMTL, beta=0.9)))
    return found


def evaluate(case: Case, variant: Variant) -> dict[str, Any]:
    ratios = [step(a) / step(b) for a, b in zip(case.times[variant.name], case.times["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"trunk": case.trunk, "method": variant.name, "ratio": middle, "quartiles": [low, high]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="methods whose name holds one of them")
    parser.add_argument("--rounds", type=int, default=7, help="how often the methods take turns")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for a spread.")
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about, results = environment(), []
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    chosen = [v for v in variants() if v.plain or any(word in v.name for word in options.only)]
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as log_dir:
        for trunk in TRUNKS:
            case = Case(trunk, NUM_TASKS, 10, log_dir)
            for _ in range(options.rounds):
                for variant in order.sample(chosen, len(chosen)):
                    case.time_round(variant)
            for variant in chosen[1:]:
                results.append(result := evaluate(case, variant))
                low, high = result["quartiles"]
                print(f"{trunk:4} {variant.name:28} {result['ratio']:6.2f}  [{low:.2f}, {high:.2f}]", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**about, "num_tasks": NUM_TASKS, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
