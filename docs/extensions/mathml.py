"""Formulas of the pages as MathML, which browsers draw by themselves: no script, nothing fetched from elsewhere.

docutils has the converter from LaTeX. Formulas that it cannot read end the build with a warning that shows them.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
# What LaTeX has and the converter has not, as what it has.
ALIASES = ((r"\\dots\b", r"\\ldots"), (r"\\(big|Big)(?![a-zA-Z])", r"\\\1l"))


def mathml(latex: str, *, block: bool) -> str:
    """One formula as MathML.

    Raises:
        MathError: If the converter cannot read it.
    """
    for pattern, replacement in ALIASES:
        latex = re.sub(pattern, replacement, latex)
    return str(tex2mathml(latex.strip(), as_block=block))


def _written(writer: Any, node: nodes.math | nodes.math_block, *, block: bool) -> str:
    latex = node.astext()
    try:
        return mathml(latex, block=block)
    except MathError as error:
        logger.warning("cannot be drawn: %s (%s)", latex, error, location=node)
        return f"<code>{writer.encode(latex)}</code>"


def visit_inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(_written(writer, node, block=False))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{_written(writer, node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
