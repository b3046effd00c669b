"""The table of docs/architectures.md, made from the tested models.

    python tests/architectures/architectures_table.py

writes it anew between the two marks in the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny import ARCHITECTURES, Architecture
from torch import nn

from smt_ext.architectures import ALIASES, alias_of
from smt_ext.layouts import ExpertMatrix, Matrix, tied_weights
from smt_ext.planning.targets import select_targets

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEADER = (
    *("Architecture", "Model class", "Query, key, value", "Attention output", "MLP"),
    *("Also `all-linear`", "Stored in", "With bias", "Tied, left out", "Notes"),
)


def page_with_table(page: str) -> str:
    """The page with the table between its marks replaced by the present one."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def table() -> str:
    """The whole table, Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(_row(a) for a in ARCHITECTURES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(architecture: Architecture) -> list[str]:
    model = architecture.model()
    linears = select_targets(model, "all-linear")
    by_alias = {alias: select_targets(model, alias) for alias in ("qkv", "o", "mlp")}
    other = [name for name in linears if not any(name in found for found in by_alias.values())]
    tied = tied_weights(model)
    return [
        architecture.name,
        f"`{type(model).__name__}`",
        *(_names(found) for found in by_alias.values()),
        _names(other),
        ", ".join(dict.fromkeys(_class(m) for m in linears.values())),
        _biases(linears),
        ", ".join(f"`{name}`" for name in tied if isinstance(model.get_submodule(name), nn.Linear)),
        architecture.note,
    ]


def _names(names: Iterable[str]) -> str:
    """The ends of the names that aliases know, each once."""
    return ", ".join(dict.fromkeys(f"`{alias_of(n) or n.rpartition('.')[2]}`" for n in names))


def _class(matrix: Matrix) -> str:
    if isinstance(matrix, ExpertMatrix):
        return f"`{type(matrix.experts).__name__}`"
    return "`nn.Linear`" if type(matrix) is nn.Linear else f"`{type(matrix).__name__}`"


def _biases(linears: dict[str, Matrix]) -> str:
    have = [n for n, m in linears.items() if getattr(m, "bias", None) is not None]
    if len(have) in (0, len(linears)):
        return "all" if have else "none"
    known = [name for name in have if alias_of(name) in ALIASES["attention"] + ALIASES["mlp"]]
    return _names(known) or _names(have)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
