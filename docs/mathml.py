"""Formulas as MathML, made when the pages are built: browsers show it as it is, without a script."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# The TeX source stays with each formula, for screen readers and for those who copy it.
_CONVERTER = LatexToMathML(annotation=True, fancy_error=False)


def _convert(node: nodes.math | nodes.math_block, *, display: bool) -> str:
    source = node.astext()
    try:
        return _CONVERTER.convert_with_local_state(source, displaystyle=display)
    except LatexError as error:
        # Not at a line of the page: docutils keeps none for a formula within a paragraph.
        raise ExtensionError(f"cannot write {source!r} as MathML: {error}") from None


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(_convert(node, display=False))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="formula"))
    writer.body.append(f"{_convert(node, display=True)}</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
