"""The page of a comparison: one HTML file that holds everything, its pictures included."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_mtl.metrics import Interval
from lightning_mtl.paired import Difference
from lightning_mtl.transfer.finished import of_seeds
from lightning_mtl.tuning.comparing.advice import advice
from lightning_mtl.tuning.comparing.cells import counted, nothing
from lightning_mtl.tuning.comparing.picture import draw
from lightning_mtl.tuning.comparing.result import Comparison
from lightning_mtl.tuning.comparing.rows import EQUAL, SINGLE
from lightning_mtl.tuning.comparing.words import verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d0d7de; --page: #fff; --card: #f6f8fa;
  --better: #0969da; --worse: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --card: #151b23; --better: #58a6ff; --worse: #f0883e; } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
.about, .notes { color: var(--soft); font-size: .9rem } .about { margin: .2rem 0 0 }
ul { padding-left: 1.2rem; margin: .4rem 0 } li { margin: .35rem 0 } .lead { font-size: 1.08rem; margin-top: 1.4rem }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100% }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
th { color: var(--soft); font-weight: 600 } .better { color: var(--better); font-weight: 600 }
.worse { color: var(--worse); font-weight: 600 } small { color: var(--soft); font-weight: 400 }
td:first-child small { display: block; max-width: 15rem; white-space: normal }
"""


def write_page(result: Comparison, *, about: str = "") -> str:
    """Return the page: what differs in words, the picture, the tables, what to try next; it loads nothing else.

    Numbers are in ``<data>`` elements, whose values are unrounded.

    Args:
        result: The comparison.
        about: What was compared, a line below the title.
    """
    lead, *rest = verdict(result)
    data = "test data" if result.stage == "test" else "validation data"
    told = " · ".join(filter(None, (about, data, counted(len(result.seeds), "seed"), counted(len(result.rows), "row"))))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of multi-task methods</title><style>{STYLE}</style></head><body>
<h1>Comparison of multi-task methods</h1>
<p class="about">{html.escape(told)}</p>
<p class="lead">{html.escape(lead)}</p>
{_list(rest)}
{_pictures(result)}
<h2>All rows</h2>
{_main_table(result)}
<p class="notes">{html.escape(" ".join(result.notes()))}</p>
<h2>What to try next</h2>
{_list(advice(result))}
<h2>Task by task</h2>
{_task_table(result)}
<p class="notes">Change of each task's metrics against equal weights in %, negative is better. Brackets: 95 % intervals
of Student's t, not corrected for the number of tasks and rows: an interval without 0 is no finding by itself.</p>
<h2>Scores</h2>
{_score_table(result)}
<p class="notes">Means over the seeds with 95 % intervals of Student's t; ↑ higher is better, ↓ lower is better.</p>
</body></html>
"""


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _pictures(result: Comparison) -> str:
    light, dark = (_embedded(draw(result, dark=dark, transparent=True)) for dark in (False, True))
    alt = "Each row's change against equal weights with its 95 % interval; the table below has the numbers."
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<picture>{source}<img src="{light}" alt="{html.escape(alt)}"></picture>'


def _embedded(figure: Figure) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _main_table(result: Comparison) -> str:
    alone = bool(result.against_single)
    heads = [
        "row",
        "learning rate",
        "Δm to equal, %",
        "p",
        *(["Δm to single, %"] if alone else []),
        "rank",
        "time a step",
    ]
    lines = []
    for row in result.rows:
        name = html.escape(row.name + of_seeds(len(result.finished(row.name)), len(result.seeds)))
        name += f"<small>{html.escape(row.variant)}</small>" if row.variant else ""
        if row.failed:
            lines.append([html.escape(row.name), "–", "failed", *["–"] * (len(heads) - 3)])
            continue
        difference, single = result.against_equal.get(row.name), result.against_single.get(row.name)
        ratio = result.time_ratio(row.name)
        lines.append(
            [
                name,
                html.escape(row.rates_text(result.directions)).replace(", ", "<br>"),
                _interval(difference.interval, difference.significant) if difference else nothing(row.name == EQUAL),
                "–" if difference is None else _p(difference),
                *(
                    [_interval(single.interval, single.significant) if single else nothing(row.name == SINGLE)]
                    if alone
                    else []
                ),
                _number(result.ranks.get(row.name, math.nan), ".1f"),
                "–" if row.name == SINGLE else _number(ratio, ".2f"),
            ]
        )
    return _table(heads, lines)


def _task_table(result: Comparison) -> str:
    lines = [
        [html.escape(name), *(_interval(result.task_change(name, task)) for task in result.directions)]
        for name in result.chosen
        if name != EQUAL
    ]
    return _table(["row", *map(html.escape, result.directions)], lines)


def _score_table(result: Comparison) -> str:
    cells = [(task, metric, up) for task, own in result.directions.items() for metric, up in own.items()]
    heads = [f"{html.escape(task)}<br>{html.escape(metric)} {'↑' if up else '↓'}" for task, metric, up in cells]
    lines = [
        [html.escape(name), *(_interval(result.score(name, task, metric), form=".4g") for task, metric, _ in cells)]
        for name in result.chosen
    ]
    return _table(["row", *heads], lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f'<data value="{float(value)!r}">{value:{form}}</data>'


def _p(difference: Difference) -> str:
    return f'<data value="{float(difference.p_corrected)!r}">{html.escape(difference.p_text)}</data>'


def _interval(interval: Interval, significant: bool = False, form: str = "+.1f") -> str:
    mean, low, high = interval
    shown = _number(mean, form)
    if not math.isnan(low):
        shown += f" <small>[{_number(low, form)}, {_number(high, form)}]</small>"
    return f'<span class="{"better" if mean < 0 else "worse"}">{shown}</span>' if significant else shown
