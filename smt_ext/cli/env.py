"""What smt_ext runs on: versions, CPU features in use, threads, CUDA kernels."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import ops

__all__ = ["environment"]

_PACKAGES = ("transformers", "safetensors", "peft", "accelerate", "numpy")


def environment() -> dict[str, str]:
    """Facts by name, in the order to be printed."""
    cuda = ops.cuda_archs()
    return {
        "smt_ext": _version("smt_ext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "CPU": _cpu_name(),
        "CPU kernels": ops.cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "CUDA kernels": f"compiled in for {cuda.replace(';', ', ')}" if cuda else "not compiled in",
        "CUDA devices": _devices(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or "unknown"
    return platform.processor() or "unknown"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
