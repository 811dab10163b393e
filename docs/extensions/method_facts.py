"""What the page of a method says beside its docstring: what a step costs, and its weights on the quickstart."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_mtl import Aggregator, Weighting, weighting
from lightning_mtl.cli.method_table import Method, methods

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FAR_APART = 100.0  # from the median weight to the largest
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
WRAPPERS = ("CRMOGM", "Frozen", "Rotating")
COSTS_AS_MUCH = {"PIVRG": "FairGrad"}  # whose solver it has
Costs = Mapping[str, Mapping[str, float]]


def read_costs() -> Costs:
    """``{method: {trunk: a step over a plain one}}``, as ``make bench-methods`` has measured."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))["results"]:
        found.setdefault(row["method"], {})[row["trunk"]] = row["ratio"]
    return found


def read_weights() -> dict[str, dict[str, Any]]:
    """``{method: what was given, and its weights}``, as ``benchmarks/quickstart_weights.py`` has recorded."""
    read: dict[str, Any] = json.loads((RESULTS / "quickstart_weights.json").read_text(encoding="utf-8"))
    return {name: {**found, "every_n_steps": read["every_n_steps"]} for name, found in read["methods"].items()}


def cost(method: str, costs: Costs) -> str:
    """Both trunks' ratios, ``"4.6 / 4.2"``; empty where none was measured."""
    name, _, place = method.partition(" ")
    row = costs.get(f"{COSTS_AS_MUCH.get(name, name)} {place}".strip(), {})
    return f"{row['mlp']:.1f} / {row['conv']:.1f}" if {"mlp", "conv"} <= row.keys() else ""


def when(name: str) -> str:
    """The sentence after ``When:`` in a method's docstring."""
    text = inspect.getdoc(getattr(weighting, name)) or ""
    found = re.search(r"^When: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def measured(method: Method) -> str:
    """What the method reads, and where."""
    kind: type[Weighting] = getattr(weighting, method.name)
    other = {"DTP": "a metric", "NTKWeighting": "residuals"}.get(method.name, "losses")
    what = {"gramian": "Gramian", "losses": other}.get(method.measures, method.measures)
    if method.name in WRAPPERS:
        return "as the wrapped method"
    if method.measures == "losses" and not issubclass(kind, Aggregator):
        return what
    return f"{what}, `{method.at or 'trunk'}`"


def scales_heads(method: Method) -> str:
    kind: type[Weighting] = getattr(weighting, method.name)
    if method.name in WRAPPERS:
        return "as wrapped"
    if kind.head_weights is not Weighting.head_weights:
        return "by another factor"
    return "yes" if method.weighs_heads else "no"


def papers(method: Method) -> list[str]:
    return [part.strip() for part in method.paper.split(",") if part.strip()]


def table() -> str:
    """The table of all methods, in Markdown."""
    costs = read_costs()
    lines = [
        "| method | when | measures | a step costs | at the features | paper |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods():
        links = ", ".join(
            f"[{paper}](https://arxiv.org/abs/{paper})" if paper[0].isdigit() else paper for paper in papers(method)
        )
        cells = (
            f"`{method.name}`",
            when(method.name).replace("``", "`"),
            measured(method),
            cost(method.name, costs),
            cost(f"{method.name} features", costs),
            links,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page whose table of methods, between two comments, is that of today."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def draw_weights(shown: str, weights: Mapping[str, list[float | None]], every_n_steps: int, path: Path) -> None:
    """The weights of all tasks over the steps, as SVG, on a logarithmic axis where they are far apart."""
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    for task, values in weights.items():
        numbers = [math.nan if value is None else value for value in values]
        axes.plot([every_n_steps * n for n in range(len(values))], numbers, label=task, linewidth=1.2)
    known = sorted(value for values in weights.values() for value in values if value is not None)
    middle = known[len(known) // 2]
    if middle > 0.0 and known[-1] > FAR_APART * middle:
        axes.set_yscale("symlog", linthresh=middle)  # linear below, for weights may be 0 or negative
    else:
        axes.set_ylim(bottom=min(0.0, 1.1 * known[0]))
    axes.set_xlabel("step")
    axes.set_ylabel("weight")
    axes.set_title(shown, fontsize=10, family="monospace")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
