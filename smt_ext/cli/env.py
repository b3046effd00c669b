"""What smt_ext runs on: versions, CPU features in use, threads, CUDA kernels, rates."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import ops
from ..precision import matmul_rates, slow_bfloat16, training_dtype

__all__ = ["environment"]

_PACKAGES = ("transformers", "safetensors", "peft", "accelerate", "numpy")


def environment(*, rates: bool = True) -> dict[str, str]:
    """Facts by name, in the order to be printed; without ``rates`` the same at every call."""
    archs = ops.cuda_archs().replace(";", ", ")
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "smt_ext": _version("smt_ext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "CPU": _cpu_name(),
        "CPU kernels": ops.cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "CUDA kernels": f"compiled in for {archs}" if archs else "not compiled in",
        "CUDA devices": ", ".join(map(torch.cuda.get_device_name, gpus)) or "none",
        **(dict(_rates()) if rates else {}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or "unknown")


def _rates() -> Iterator[tuple[str, str]]:
    """GFLOP/s of the matrix products of a step in either precision, and the precision that suits."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        where, threads = ("CPU", " (one thread)") if device == "cpu" else ("GPU", "")
        for rate in matmul_rates(device):
            product = "planning" if rate.product == "block_score_fused" else rate.product
            values = f"{rate.float32:,.3g} GFLOP/s in float32, {rate.bfloat16:,.3g} in bfloat16"
            yield f"{where} {product}", values + threads
        slow = slow_bfloat16(device)
        why = f", for bfloat16 takes {slow:.3g} times as long" if slow else ""
        dtype = str(training_dtype(device)).removeprefix("torch.")
        yield f"{where} precision", f"auto is {dtype}{why}"
