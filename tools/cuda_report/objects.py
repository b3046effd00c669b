"""The CUDA sources as setup.py compiles them, and what ptxas and the binaries say.

The objects are those of the extension's own build, in build/objects: where they are up to date nothing
is compiled. What was read from a file lies in build/cuda_report under the hash of the sources, the
flags and the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import sass

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "kernels"


class ReportError(Exception):
    """A tool is missing or failed; the text says which and what to do."""


def setup_py() -> ModuleType:
    """setup.py as a module: its flags and its way to nvcc, without building anything."""
    spec = importlib.util.spec_from_file_location("smt_ext_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Compiled:
    """A kernel on an architecture, as compiled."""

    file: str
    symbol: str
    arch: str  # "80"
    registers: int
    stack: int  # bytes
    spill_stores: int
    spill_loads: int
    barriers: int
    static_shared: int
    threads: int  # most of a block: __launch_bounds__
    loop: dict[str, int] | None  # instructions of the main loop by kind


class Toolchain:
    """nvcc, cuobjdump and the flags of the build."""

    def __init__(self) -> None:
        setup = self._setup = setup_py()
        self._lock = threading.Lock()
        nvcc, cuobjdump = setup.find_nvcc(), sass.find_tool("cuobjdump")
        if nvcc is None:
            raise ReportError(
                "no nvcc: install the CUDA toolkit (12.8 or newer), or set CUDA_HOME to where it is"
            )
        if cuobjdump is None or sass.find_tool("nvdisasm") is None:
            raise ReportError(
                "no cuobjdump or nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
            )
        self.nvcc: str = nvcc
        self.cuobjdump = cuobjdump
        self.include: Path = setup.folder_with(setup.toolkit_of(nvcc), "include", "cuda_runtime.h")
        self.sources: list[Path] = setup.cuda_sources()
        self.flags: list[str] = [*setup.NVCC_FLAGS, *setup.gencode_flags()]
        self.architectures = [
            match[1] for flag in self.flags if (match := re.search(r"code=sm_(\w+)$", flag))
        ]
        self.version = run([nvcc, "--version"])

    def built(self, source: Path) -> tuple[Path, str]:
        """The extension's object of a source, compiled with all others if need be; ptxas's account."""
        commands = [self._setup.nvcc_command(self.nvcc, each) for each in self.sources]
        with self._lock:
            try:
                objects = self._setup.compile_all(commands, self._setup.OBJECTS)
            except SystemExit as error:
                raise ReportError(str(error)) from None
        target: Path = objects[self.sources.index(source)]
        return target, Path(f"{target}.log").read_text(encoding="utf-8")

    def compile(self, source: Path, target: Path) -> str:
        """ptxas's account of the kernels; the object is at ``target``."""
        command = [self.nvcc, *self.flags, "--resource-usage", "-c", str(source), "-o", str(target)]
        return run(command, stderr=True)


def run(command: Sequence[str], *, stderr: bool = False, text: str | None = None) -> str:
    """The output of a program; ReportError with both outputs when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=text)
    if done.returncode:
        raise ReportError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stderr if stderr else done.stdout


def read_all(tools: Toolchain, folder: Path) -> list[Compiled]:
    """Every kernel of every source on every architecture, several files at a time."""
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda source: read(tools, source, folder), tools.sources)
        return [kernel for part in parts for kernel in part]


def read(tools: Toolchain, source: Path, folder: Path) -> list[Compiled]:
    """Every kernel of a source on every architecture, from the folder if nothing has changed."""
    rows = cached(
        tools, folder, source.stem, source.read_text(encoding="utf-8"),
        lambda scratch: [asdict(kernel) for kernel in _compile_and_read(tools, source, scratch)],
    )  # fmt: skip
    return [Compiled(**row) for row in rows]


def cached(
    tools: Toolchain, folder: Path, name: str, text: str, make: Callable[[Path], Any]
) -> Any:
    """make(scratch folder), or what it gave (as JSON) for this text, these headers and tools.

    The latest for each name and list of architectures is kept.
    """
    folder = folder / "-".join(tools.architectures)
    key = hashlib.sha256("\0".join([text, tools.version, *tools.flags]).encode())
    headers = [p for p in KERNELS.rglob("*") if p.suffix in (".h", ".cuh")]
    readers = [Path(__file__).with_name(name) for name in ("objects.py", "sass.py")]
    for path in [*sorted(headers), *readers]:
        key.update(path.read_bytes())
    record = folder / f"{name}-{key.hexdigest()[:16]}.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            value = make(Path(scratch))
            # Under its name only when whole: another process may read at the same time.
            part = Path(scratch) / record.name
            part.write_text(json.dumps(value), encoding="utf-8")
            for old in folder.glob(f"{name}-*.json"):
                old.unlink(missing_ok=True)
            part.replace(record)
    return json.loads(record.read_text(encoding="utf-8"))


def _compile_and_read(tools: Toolchain, source: Path, scratch: Path) -> list[Compiled]:
    if source in tools.sources:
        target, account = tools.built(source)
    else:
        target = scratch / f"{source.stem}.o"
        account = tools.compile(source, target)
    usage = parse_usage(account)
    threads = parse_threads(
        run([tools.cuobjdump, "-elf", "-arch", f"sm_{tools.architectures[0]}", str(target)])
    )
    kernels = []
    for arch in tools.architectures:
        for symbol, code in sass.disassemble(tools.cuobjdump, target, arch).items():
            if symbol not in threads:
                raise ReportError(f"{source.name}: {symbol} has no __launch_bounds__")
            loop = sass.main_loop(code)
            kernels.append(
                Compiled(
                    source.name, symbol, arch, **usage[symbol, arch], threads=threads[symbol],
                    loop=dict(loop.counts) if loop else None,
                )
            )  # fmt: skip
    return kernels


def parse_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(Kernel, architecture) -> fields of Compiled, from nvcc --resource-usage."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    fields: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            fields = usage.setdefault((found[1], found[2]), {"barriers": 0, "static_shared": 0})
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            names = ("stack", "spill_stores", "spill_loads")
            fields.update(zip(names, map(int, found.groups()), strict=True))
        elif found := re.search(r"Used (\d+) registers", line):
            fields["registers"] = int(found[1])
            if found := re.search(r"used (\d+) barriers", line):
                fields["barriers"] = int(found[1])
            if found := re.search(r"(\d+) bytes smem", line):
                fields["static_shared"] = int(found[1])
    return usage


def parse_threads(text: str) -> dict[str, int]:
    """Kernel -> the threads that its __launch_bounds__ allow, from cuobjdump -elf."""
    threads: dict[str, int] = {}
    symbol = attribute = ""
    for line in text.splitlines():
        if found := re.match(r"\.nv\.info\.(\S+)", line):
            symbol = found[1]
        elif found := re.match(r"\s+Attribute:\s+(\w+)", line):
            attribute = found[1]
        elif attribute == "EIATTR_MAX_THREADS" and (found := re.match(r"\s+Value:\s+(.*)", line)):
            x, y, z = (int(size, 16) for size in found[1].split())
            threads[symbol] = x * y * z
    return threads
