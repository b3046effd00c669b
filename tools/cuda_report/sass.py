"""Machine code of a compiled file: its kernels, their loops, and what a loop is made of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Kind -> opcodes, the part before the first dot. What never executes ("@!PT LDS RZ, [RZ]"; ptxas
# spaces others out with it) is "padding", everything else "rest": addresses, loop counts, barriers,
# conversions.
KINDS = {
    "mma": ("HMMA", "DMMA"),
    "fma": ("FFMA", "FFMA2", "DFMA"),
    "ldmatrix": ("LDSM",),
    "shared load": ("LDS",),
    "shared store": ("STS",),
    "async copy": ("LDGSTS",),
    "global load": ("LDG",),
}


class Instruction(NamedTuple):
    address: int
    text: str  # "@!P0 BRA 0x1f0"

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?\w+\s+", "", self.text).split(".")[0].split()[0]

    @property
    def kind(self) -> str:
        if self.text.startswith(("@!PT", "@!UPT")):
            return "padding"
        return next((kind for kind, names in KINDS.items() if self.opcode in names), "rest")


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: the virtual environment's (PyPI nvidia-*), else PATH's."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    for folder in sorted(site_packages.glob("nvidia/*/bin")):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name)


def disassemble(cuobjdump: str, binary: Path, architecture: str) -> dict[str, list[Instruction]]:
    """Kernel (mangled) -> its instructions on an architecture such as "80"."""
    text = subprocess.run(
        [cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(binary)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return parse(text)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The same, of cuobjdump's text."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = kernels.setdefault(name[1], [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append(Instruction(int(found[1], 16), found[2]))
    return kernels


@dataclass(frozen=True)
class Loop:
    """What one turn of a loop issues, instructions by kind."""

    counts: Mapping[str, int]

    @property
    def unit(self) -> str:
        """What the loop is there for: "mma" or "fma"."""
        return "mma" if self.counts.get("mma") else "fma"

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    @property
    def per_unit(self) -> float:
        """Instructions that are issued for each mma (or fma)."""
        return self.instructions / self.counts[self.unit]


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The innermost loop with the most mma; with the most fma where there is no mma; else None.

    Of the ways through it, the one of a whole panel counts: with the most mma (fma), then the most
    copies, then the fewest other instructions. The others are taken once, by the last panels.
    """
    graph = _successors(code)
    back = _back_edges(graph)
    bodies = {header: _body(graph, header, latches) for header, latches in back.items()}
    for unit in ("mma", "fma"):
        within = {
            header: sum(code[i].kind == unit for i in body) for header, body in bodies.items()
        }
        innermost = [
            header for header, body in bodies.items()
            if within[header] and not any(
                other in body and other != header and within[other] for other in bodies
            )
        ]  # fmt: skip
        if innermost:
            header = max(innermost, key=lambda h: within[h])
            path = _whole_panel(code, graph, header, bodies[header], back[header], unit)
            return Loop(dict(Counter(code[i].kind for i in path)))
    return None


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Index of an instruction -> indices of those that may follow it."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    graph: list[list[int]] = []
    for i, instruction in enumerate(code):
        following = [i + 1] if i + 1 < len(code) else []
        guarded = instruction.text.startswith("@")
        if instruction.opcode in ("EXIT", "RET"):
            graph.append(following if guarded else [])
        elif instruction.opcode == "BRA":
            *conditions, target = re.sub(r"^@!?\w+\s+", "", instruction.text).split()[1:]
            # A condition may also be an operand: "BRA.DIV ~URZ, 0x1f0".
            stays = following if guarded or conditions else []
            graph.append([*stays, at[int(target, 16)]])
        else:
            graph.append(following)
    return graph


def _back_edges(graph: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Header of a loop -> the last instructions of its turns, by depth-first search."""
    edges: dict[int, list[int]] = {}
    state = [0] * len(graph)  # 0 new, 1 on the path, 2 done
    stack = [(0, iter(graph[0]))] if graph else []
    if stack:
        state[0] = 1
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if state[following] == 1:
                edges.setdefault(following, []).append(node)
            elif state[following] == 0:
                state[following] = 1
                stack.append((following, iter(graph[following])))
                break
        else:
            state[node] = 2
            stack.pop()
    return edges


def _body(graph: Sequence[Sequence[int]], header: int, latches: Iterable[int]) -> set[int]:
    """The natural loop: what reaches a latch without passing the header."""
    before: list[list[int]] = [[] for _ in graph]
    for node, following in enumerate(graph):
        for other in following:
            before[other].append(node)
    body, open_nodes = {header}, list(latches)
    while open_nodes:
        node = open_nodes.pop()
        if node not in body:
            body.add(node)
            open_nodes += before[node]
    return body


def _whole_panel(
    code: Sequence[Instruction], graph: Sequence[Sequence[int]], header: int, body: set[int],
    latches: Sequence[int], unit: str,
) -> list[int]:  # fmt: skip
    """The path from the header to a latch that main_loop() counts."""
    # Backwards through the loop, every instruction after all that follow it.
    order: list[int] = []
    seen = {header}
    stack = [(header, iter(graph[header]))]
    on_path = {header}
    inner: set[tuple[int, int]] = set()  # edges that turn back within: taken no time
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following in on_path:
                inner.add((node, following))
            elif following in body and following not in seen:
                seen.add(following)
                on_path.add(following)
                stack.append((following, iter(graph[following])))
                break
        else:
            order.append(node)
            on_path.discard(node)
            stack.pop()
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for node in order:
        ways: list[tuple[tuple[int, int, int], int | None]] = [
            (best[following][0], following)
            for following in graph[node]
            if following in best and (node, following) not in inner
        ]
        if node in latches:
            ways.append(((0, 0, 0), None))
        if ways:
            (units, copies, others), then = max(ways, key=lambda way: way[0])
            kind = code[node].kind
            copy = kind in ("async copy", "global load", "shared store")
            best[node] = ((units + (kind == unit), copies + copy, others - 1), then)
    path: list[int] = []
    node_or_none: int | None = header
    while node_or_none is not None:
        path.append(node_or_none)
        node_or_none = best[node_or_none][1]
    return path
