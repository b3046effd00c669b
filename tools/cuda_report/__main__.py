"""`make cuda-report`: registers, spills, shared memory, occupancy and main loops, per architecture.

    PYTHONPATH=tools python -m cuda_report [--kernel block_grad] [--arch 80 90] [--json report.json]

Tables are Markdown. Exits with 1 where a kernel spills or fewer blocks fit a multiprocessor than its
__launch_bounds__ ask for. Needs nvcc, cuobjdump and nvdisasm, no GPU: numbers of instructions, not
of time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .objects import ROOT, ReportError, Toolchain
from .report import Row, report
from .sass import KINDS

RESOURCES = ("kernel", "sm", "registers", "spilled", "stack", "shared", "threads", "blocks",
             "occupancy", "limited by")  # fmt: skip
LOOP_KINDS = (*KINDS, "padding", "rest")
LOOPS = ("kernel", "sm", *LOOP_KINDS, "instructions / mma or fma", "mma / ldmatrix")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="cuda_report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--arch", nargs="*", help="only these, of those in SMT_EXT_CUDA_ARCHS")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, too")
    args = parser.parse_args()
    try:
        rows = report(Toolchain(), ROOT / "build" / "cuda_report")
    except ReportError as error:
        sys.exit(f"cuda_report: {error}")
    rows = [
        row for row in rows
        if args.kernel in row.kernel and (not args.arch or row.arch in args.arch)
    ]  # fmt: skip
    rows.sort(key=lambda row: (row.compiled.file, row.kernel, int(row.arch.rstrip("af"))))
    if not rows:
        sys.exit(f"cuda_report: no kernel has {args.kernel!r} in its name on these architectures")
    print("Resources. shared: bytes, static + dynamic; blocks: of a multiprocessor.\n")
    print(table(RESOURCES, [resources(row) for row in rows]))
    looping = [row for row in rows if row.engine and row.loop]
    if looping:
        print(
            "\nMain loops: instructions that a warp issues in one turn, a whole panel of tokens.\n"
        )
        print(table(LOOPS, [loops(row) for row in looping]))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [f"{row.kernel} on sm_{row.arch}: {what}" for row in rows for what in faults(row)]
    if bad:
        sys.exit("\n" + "\n".join(bad))


def faults(row: Row) -> list[str]:
    """What no kernel may do."""
    found = []
    if row.spills:
        found.append(f"spills {row.spills} bytes")
    if row.compiled.stack:
        found.append(f"has a stack frame of {row.compiled.stack} bytes")
    if row.engine and row.blocks < row.engine.blocks:
        found.append(f"{row.blocks} blocks fit a multiprocessor, {row.engine.blocks} shall")
    return found


def resources(row: Row) -> list[str]:
    compiled = row.compiled
    shared = f"{compiled.static_shared}+{row.engine.shared if row.engine else 0}"
    numbers = (compiled.registers, row.spills, compiled.stack, shared, compiled.threads, row.blocks)
    return [row.kernel, row.arch, *map(str, numbers), f"{row.occupancy:.0%}", row.limit]


def loops(row: Row) -> list[str]:
    loop = row.loop
    assert loop is not None
    counts = [str(loop.counts.get(kind, 0)) for kind in LOOP_KINDS]
    ldmatrix = loop.counts.get("ldmatrix", 0)
    per_ldmatrix = f"{loop.counts['mma'] / ldmatrix:.2f}" if ldmatrix else ""
    return [row.kernel, row.arch, *counts, f"{loop.per_unit:.2f}", per_ldmatrix]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([text(header), text(rule), *map(text, rows)])


if __name__ == "__main__":
    main()
