"""Timing side by side on CPU and GPU, memory, and JSON records, for all benchmarks."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from smt_ext.cli.env import environment

# SMT_RECORDS names another folder than that of the repository's own records.
RECORDS = Path(os.environ.get("SMT_RECORDS") or Path(__file__).parent / "records")

SAMPLES = {"cpu": 11, "cuda": 50}
CUDA_WARM_UP = 5
FLUSH_BYTES = 256 << 20  # several times the largest L2 cache (72 MB, RTX 4090)


@dataclass(frozen=True)
class Timing:
    """Seconds of each sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(percent / 100 * (len(ordered) - 1))]


def side_by_side(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    samples: int | None = None,
    seconds: float = 0.03,
) -> dict[str, Timing]:
    """Time the contestants in turns, so that a slow moment of the machine hits all of them.

    On the CPU a sample calls its contestant as often as fills ``seconds``, after one call that is not
    counted: short operators are measured as they run in a training step, on data that was just used.
    On "cuda" see :func:`side_by_side_on_cuda`.
    """
    samples = samples or SAMPLES[device]
    if device == "cuda":
        return side_by_side_on_cuda(contestants, samples)
    calls = {}
    for name, run in contestants.items():
        run()
        begin = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - begin)))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(samples):
        for name, run in contestants.items():
            run()
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            taken[name].append((time.perf_counter() - begin) / calls[name])
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def side_by_side_on_cuda(
    contestants: Mapping[str, Callable[[], Any]], samples: int
) -> dict[str, Timing]:
    """A sample is one call between two CUDA events, with nothing of its data in the L2 cache.

    Flushing takes the GPU longer than it takes the host to launch what follows, so that launches
    of a few kernels do not count; those of a Python loop do, as they would in training.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for run in contestants.values():
        for _ in range(CUDA_WARM_UP):
            run()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(samples):
        for name, run in contestants.items():
            taken[name].append(seconds_on_cuda(run, flush))
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def seconds_on_cuda(run: Callable[[], Any], flush: torch.Tensor | None = None) -> float:
    """GPU time of one call; ``flush`` is overwritten before, to empty the caches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class HostMemory:
    """Resident memory of this process, in bytes; Linux."""

    def held(self) -> int:
        """Without what the C library keeps of freed memory."""
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        return self._status("VmRSS")

    def peak(self) -> int:
        """Most held since the last reset."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def _status(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {key}")


class CudaMemory:
    """What tensors of this process hold on the current GPU, in bytes."""

    def held(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Most held since the last reset."""
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def require_device(device: str) -> None:
    """Exit where the GPU that is asked for is not there, or smt_ext has no kernels for it."""
    if device != "cuda":
        return
    from smt_ext import ops

    if not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if not ops.cuda_archs():
        raise SystemExit(
            "--device cuda: smt_ext was built without CUDA kernels; where nvcc is, run "
            "SMT_EXT_CUDA=1 pip install --no-build-isolation ."
        )


def keeps_records(trial: bool) -> bool:
    """Whether a run is recorded; a trial only where SMT_RECORDS says where."""
    return not trial or bool(os.environ.get("SMT_RECORDS"))


def save_record(
    name: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    row_a_line: bool = False,
) -> Path:
    """Write one run's numbers, every sample included, to ``records/<name>.json``.

    A run on a CPU without AVX-512, or held down by ``SMT_EXT_CPU``, has a record of its own.
    """
    from smt_ext import ops

    RECORDS.mkdir(parents=True, exist_ok=True)
    lesser = not ops.cpu_capability().startswith("avx512")
    if lesser or os.environ.get("SMT_EXT_CPU"):
        name = f"{name}_{ops.cpu_capability()}"
    path = RECORDS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": {
            **environment(rates=False),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
            "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
            "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
            "MKL_ENABLE_INSTRUCTIONS": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
        },
        "settings": dict(settings),
        "rows": [] if row_a_line else list(rows),
    }
    text = json.dumps(record, indent=1)
    if row_a_line:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = text.removesuffix('"rows": []\n}') + f'"rows": [\n{lines}\n ]\n}}'
    path.write_text(text + "\n", encoding="utf-8")
    return path


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Columns aligned; numbers as they are in the rows."""
    cells = [list(columns)] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(w) if i else text.ljust(w)
                        for i, (text, w) in enumerate(zip(line, widths, strict=True))))  # fmt: skip


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def dtype_of(name: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
