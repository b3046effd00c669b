"""Rows of the report: a kernel on an architecture, with its name, occupancy and main loop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .objects import Compiled, Toolchain, cached, read_all, run
from .sass import Loop

ELEMENTS = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32", "double": "f64"}


@dataclass(frozen=True)
class Engine:
    """The constants of an engine of tile_product.cuh."""

    threads: int
    blocks: int  # that a multiprocessor shall hold: __launch_bounds__
    shared: int  # bytes of dynamic shared memory


@dataclass(frozen=True)
class Row:
    kernel: str  # "block_grad<MmaTile<bf16, 128, 128>, false>"
    compiled: Compiled
    engine: Engine | None  # of the kernels that multiply tiles
    blocks: int  # that a multiprocessor holds
    occupancy: float  # resident warps / the most that there can be
    limit: str  # what keeps it there: "registers", "shared", "threads", "blocks"

    @property
    def arch(self) -> str:
        return self.compiled.arch

    @property
    def spills(self) -> int:
        """Bytes stored and loaded."""
        return self.compiled.spill_stores + self.compiled.spill_loads

    @property
    def loop(self) -> Loop | None:
        return Loop(self.compiled.loop) if self.compiled.loop else None


def report(tools: Toolchain, folder: Path) -> list[Row]:
    """Compile and read everything; ``folder`` keeps what was read."""
    kernels = read_all(tools, folder)
    names = demangle(kernel.symbol for kernel in kernels)
    engines = {kernel.symbol: engine_of(names[kernel.symbol]) for kernel in kernels}
    constants = engine_constants(tools, {name for name in engines.values() if name}, folder)
    of_kernel = [
        constants[name] if (name := engines[kernel.symbol]) else None for kernel in kernels
    ]
    held = occupancy(tools, kernels, of_kernel, folder)
    return [
        Row(short_name(names[kernel.symbol]), kernel, engine, *result)
        for kernel, engine, result in zip(kernels, of_kernel, held, strict=True)
    ]


def demangle(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> its C++ name, by c++filt of binutils."""
    unique = sorted(set(symbols))
    names = run(["c++filt"], text="\n".join(unique)).splitlines()
    return dict(zip(unique, names, strict=True))


def short_name(demangled: str) -> str:
    """ "void smt_ext::cuda::f_kernel<float, 4>(Args)" -> "f<f32, 4>"."""
    name = demangled.removeprefix("void ").replace("smt_ext::cuda::", "")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = i
            break
    name = re.sub(r"_kernel\b", "", name[:end], count=1)
    return re.sub(r"\b\w+\b", lambda word: ELEMENTS.get(word[0], word[0]), name)


def engine_of(demangled: str) -> str | None:
    """The class that a kernel is made with: "smt_ext::cuda::MmaTile<__nv_bfloat16, 128, 128>"."""
    found = re.search(r"smt_ext::cuda::\w+Tile<[^<>]*>", demangled)
    return found[0] if found else None


def engine_constants(tools: Toolchain, engines: Iterable[str], folder: Path) -> dict[str, Engine]:
    """What the classes themselves say, by a program that prints it."""
    names = sorted(engines)
    prints = "".join(
        f'  std::printf("%d %d %d\\n", int({name}::kThreads), int({name}::kBlocks), '
        f"int({name}::kSharedBytes));\n"
        for name in names
    )
    source = f'#include <cstdio>\n\n#include "tile_product.cuh"\n\nint main() {{\n{prints}}}\n'

    def compile_and_run(scratch: Path) -> list[list[int]]:
        file, program = scratch / "engines.cu", scratch / "engines"
        file.write_text(source, encoding="utf-8")
        run([tools.nvcc, "-std=c++17", f"-arch=sm_{tools.architectures[0]}",
             f"-I{tools.sources[0].parent}", str(file), "-o", str(program)])  # fmt: skip
        return [[int(word) for word in line.split()] for line in run([str(program)]).splitlines()]

    values = cached(tools, folder, "engines", source, compile_and_run)
    return {name: Engine(*value) for name, value in zip(names, values, strict=True)}


def occupancy(
    tools: Toolchain, kernels: Sequence[Compiled], engines: Sequence[Engine | None], folder: Path
) -> list[tuple[int, float, str]]:
    """Blocks a multiprocessor, share of the warps that could be resident, and what limits them."""
    lines = ""
    for kernel, engine in zip(kernels, engines, strict=True):
        number = int(re.sub(r"\D", "", kernel.arch))  # 90a is a 9.0
        dynamic = engine.shared if engine else 0
        lines += (f"{number // 10} {number % 10} {kernel.threads} {kernel.registers} "
                  f"{kernel.barriers} {kernel.static_shared} {dynamic}\n")  # fmt: skip
    source = Path(__file__).with_name("occupancy.cpp")

    def compile_and_run(scratch: Path) -> list[str]:
        program = str(scratch / "occupancy")
        run(["c++", "-std=c++17", "-isystem", str(tools.include), str(source), "-o", program])
        return run([program], text=lines).splitlines()

    held = []
    text = source.read_text(encoding="utf-8") + lines
    results = cached(tools, folder, "occupancy", text, compile_and_run)
    for kernel, result in zip(kernels, results, strict=True):
        blocks, warps, limit = result.split()
        held.append((int(blocks), int(blocks) * ((kernel.threads + 31) // 32) / int(warps), limit))
    return held
