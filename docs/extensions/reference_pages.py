"""Writes a page for each method and each part of the API before Sphinx reads the sources.

They lie in ``docs/generated``, which git ignores, beside copies of the pages that lie elsewhere in the repository.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from method_facts import cost, draw_weights, measured, papers, read_costs, read_weights, scales_heads, with_table
from public_names import PAGES, Entry, pages, paths_by_name
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from lightning_mtl.cli.method_table import Method, methods

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
# Pages of the repository that the site shows, too.
COPIES = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "SECURITY.md": "security",
    "examples/README.md": "examples",
    "examples/search/README.md": "examples_search",
    "benchmarks/README.md": "benchmarks",
}
LINK = re.compile(
    r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)
# What users call or set of bases that are not public themselves.
INHERITED = {"Weighting": ("add_state",), "MultiTaskModule": ("parameter_groups",)}


def heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n\n"


def documented(entry: Entry) -> str:
    if entry.directive == "data":
        return f".. py:data:: {entry.path}\n\n   {entry.summary}\n\n"
    text = f".. {entry.directive}:: {entry.path}\n"
    if entry.directive == "autoclass":
        text += "   :members:\n"
        text += "".join(f"\n   .. automethod:: {entry.path}.{name}\n" for name in INHERITED.get(entry.name, ()))
    return text + "\n"


def api_page(title: str, entries: list[Entry]) -> str:
    """A table of all entries, then each; methods have pages of their own."""
    text = heading(title) + ".. list-table::\n   :widths: 30 70\n\n"
    for entry in entries:
        role = {"autofunction": "func", "data": "data", "autoexception": "exc"}.get(entry.directive, "class")
        text += f"   * - :{role}:`~{entry.path}`\n     - {entry.summary}\n"
    text += "\n"
    modules = list(dict.fromkeys(entry.module for entry in entries))
    for module in modules:
        text += heading(module, "-") if len(modules) > 1 else ""
        for entry in entries:
            if entry.module == module and module != "lightning_mtl.weighting":
                text += documented(entry)
    return text


def method_page(method: Method, picture: str | None, shown: str | None) -> str:
    """The facts, the docstring with its formula, and the weights on the quickstart."""
    costs = read_costs()
    links = ", ".join(
        f"`arXiv:{paper} <https://arxiv.org/abs/{paper}>`__" if paper[0].isdigit() else paper
        for paper in papers(method)
    )
    facts = {"Measures": measured(method).replace("`", "``")}
    if own := cost(method.name, costs):
        facts["A step costs"] = f"{own} times plain training, eight tasks, an MLP / convolutions"
    if own := cost(f"{method.name} features", costs):
        facts["At the features"] = f"{own} times plain training"
    facts["Weighs heads"] = scales_heads(method)
    facts["Paper"] = links or "none"
    facts["From YAML"] = f"``--trainer.callbacks+={method.name}``"
    text = heading(method.name) + ".. list-table::\n   :widths: 25 75\n   :class: facts\n\n"
    text += "".join(f"   * - {name}\n     - {value}\n" for name, value in facts.items()) + "\n"
    text += f".. autoclass:: lightning_mtl.weighting.{method.name}\n   :members:\n\n"
    text += heading("Weights on the quickstart", "-")
    if picture is None:
        reason = (
            "No weighting of TorchJD was chosen for it"
            if method.name == "FromTorchJD"
            else f"``{method.name}`` is an aggregator: its step is no weighted sum of gradients"
        )
        return f"{text}{reason}, so there is no picture.\n"
    return text + (
        f"``{shown}`` on the `quickstart's <../examples.html#quickstart-py>`__ six tasks with ``ink`` standardized, "
        "the first 200 steps of seed 0. ``digit`` has 30 labels, which are soon learned by heart; methods that divide "
        "by losses or gradients then give it large weights.\n\n"
        f".. image:: {picture}\n   :alt: The weights of six tasks over the steps\n"
    )


def relocated(text: str, folder: Path, target: Path) -> str:
    """A Markdown page with its relative links written as from another folder."""

    def moved(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match["path"], target)
        return f"{match['mark']}[{match['text']}]({path}{match['anchor'] or ''})"

    return LINK.sub(moved, text)


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx) -> None:
    """Everything in ``docs/generated``, and the table of methods."""
    weights = read_weights()
    for method in methods():
        found, picture = weights.get(method.name), None
        if found is not None:
            picture = f"{method.name}.svg"
            (GENERATED / "methods").mkdir(parents=True, exist_ok=True)
            if not (GENERATED / "methods" / picture).exists():
                draw_weights(found["shown"], found["weights"], found["every_n_steps"], GENERATED / "methods" / picture)
        page = method_page(method, picture, found["shown"] if found else None)
        write_if_changed(GENERATED / "methods" / f"{method.name}.rst", page)
    for name, (title, entries) in pages().items():
        write_if_changed(GENERATED / "api" / f"{name}.rst", api_page(title, entries))
    for source, name in COPIES.items():
        path = ROOT / source
        text = relocated(path.read_text(encoding="utf-8"), path.parent, GENERATED)
        write_if_changed(GENERATED / f"{name}.md", text)
    index = DOCS / "methods" / "index.md"
    write_if_changed(index, with_table(index.read_text(encoding="utf-8")))


def link_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links out of ``docs/`` to the copies, to the repository if its address is known, or to the file itself."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".md":
        return

    def led(match: re.Match[str]) -> str:
        target = (path.parent / match["path"]).resolve()
        if match["mark"] or target.is_relative_to(DOCS) or not target.exists():
            return match[0]
        inside, anchor = target.relative_to(ROOT).as_posix(), match["anchor"] or ""
        if inside in COPIES:
            copy = os.path.relpath(GENERATED / f"{COPIES[inside]}.md", path.parent)
            return f"[{match['text']}]({copy}{anchor})"
        if inside == "README.md":
            return f"[{match['text']}]({os.path.relpath(DOCS / 'index.md', path.parent)})"
        if address := app.config.repository:
            return f"[{match['text']}]({address}/blob/main/{inside})"
        if target.is_dir():
            return match["text"] if match["text"].startswith("`") else f"{match['text']} (`{inside}`)"
        return match[0]

    source[0] = LINK.sub(led, source[0])
    # Sphinx warns of patterns that match no page: those of pages that a checkout has not.
    lines = source[0].splitlines(keepends=True)
    source[0] = "".join(line for line in lines if not line.startswith("../") or _matches(path.parent, line.strip()))


def _matches(folder: Path, pattern: str) -> bool:
    return "*" not in pattern or any(folder.glob(f"{pattern}.*"))


class LinkNames(SphinxTransform):
    """Makes inline code that is a public module, or begins with a public name, a link to the reference."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        known = paths_by_name()
        modules = {module: page for page, (_, names) in PAGES.items() for module in names}
        here = self.env.docname
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, nodes.reference | addnodes.pending_xref | nodes.title):
                continue
            text = node.astext()
            name = re.match(r"\w*", text)
            if page := modules.get(text):
                target = {"refdomain": "std", "reftype": "doc", "reftarget": f"/generated/api/{page}"}
            elif name and (path := known.get(name[0])) and here != f"generated/methods/{name[0]}":
                target = {"refdomain": "py", "reftype": "obj", "reftarget": path}
            else:
                continue
            link = addnodes.pending_xref("", refexplicit=True, refdoc=here, refwarn=True, **target)
            node.replace_self(link)
            link += node


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Set the first word of the paragraphs that every docstring of a method has in bold."""
    for index, line in enumerate(lines):
        lines[index] = re.sub(r"^(When|Source|Deviations): ", r"**\1:** ", line)


def keep_attribute(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon off attributes: of the first line it would take what stands before a colon for the type."""
    if what == "attribute":
        app.env.temp_data[f"docstring of {name}"] = list(lines)


def restore_attribute(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put back what napoleon has made of an attribute's docstring."""
    lines[:] = app.env.temp_data.pop(f"docstring of {name}", lines)


def whole_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: object, arguments: str | None, returns: str | None
) -> tuple[str, str] | None:
    """The arguments of a class as ``inspect`` has them; Sphinx takes those of ``__new__``, which says nothing."""
    if what != "class" or arguments is None or not obj.__module__.startswith("lightning_mtl"):
        return None
    plain = [one.replace(annotation=one.empty) for one in inspect.signature(obj).parameters.values()]
    return str(inspect.Signature(plain)), ""


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository", "", "env")
    app.add_transform(LinkNames)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_repository)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-docstring", keep_attribute, priority=450)
    app.connect("autodoc-process-docstring", restore_attribute, priority=550)
    app.connect("autodoc-process-signature", whole_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
