"""Which precision a device computes at full rate.

torch computes bfloat16 products on every device; where the instructions are missing, it does so many
times slower than float32. Brand and feature flags do not tell (oneDNN calls bfloat16 supported where
AVX-512 emulates it), so a CPU is measured: a few milliseconds, once per process and only when asked.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from . import ops
from .quantization import plain_parameters

__all__ = ["MatmulRate", "matmul_rates", "slow_bfloat16", "training_dtype", "warn_slow_bfloat16"]

# Slower than float32 by more than timing noise. Native bfloat16 takes half of float32's time,
# emulation with AVX-512 2.5 times, with AVX2 5 to 30 times.
_SLOW = 1.25

# T, K, N. Products small enough for milliseconds without bfloat16 instructions, large enough that
# the product and not the call is timed; and those of a layer of a small model.
_PROBE = (64, 256, 256)
_LAYER = (256, 576, 1536)

_warned = False


@dataclass(frozen=True)
class MatmulRate:
    """One matrix product of a training step: its name, and GFLOP/s in either precision."""

    product: str
    float32: float
    bfloat16: float


def training_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device computes it at full rate, else float32.

    Full rate have CUDA devices from compute capability 8.0 on, and CPUs on which the products of a
    step take no longer in bfloat16 than in float32 (AVX512-BF16, AMX), as measured once per process.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return torch.float32
    return torch.float32 if slow_bfloat16(device) else torch.bfloat16


def slow_bfloat16(device: torch.device | str) -> float | None:
    """How many times longer a step's matrix products take in bfloat16 than in float32.

    None where bfloat16 is not slower. A CPU is measured once per process, in some milliseconds.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    ratio = _time_ratio(device)
    return ratio if ratio > _SLOW else None


def matmul_rates(device: torch.device | str) -> list[MatmulRate]:
    """GFLOP/s of the three matrix products of a linear layer's step and of planning's own.

    Forward ``x @ w.T``, input gradient ``dy @ w``, weight gradient ``dy.T @ x`` as torch computes
    them, and :func:`smt_ext.ops.block_score_fused` (the weight gradient again, reduced at once);
    256 tokens, 576 inputs, 1536 outputs; on the CPU in one thread. Takes a second where bfloat16
    is slow.
    """
    device = torch.device(device)
    t, k, n = _LAYER
    gflop = 2 * t * k * n / 1e9
    float32, bfloat16 = (
        {
            name: gflop / _seconds(call, device)
            for name, call in _products(device, dtype, _LAYER, ours=True).items()
        }
        for dtype in (torch.float32, torch.bfloat16)
    )
    return [MatmulRate(name, rate, bfloat16[name]) for name, rate in float32.items()]


def warn_slow_bfloat16(model: nn.Module) -> None:
    """Warn, once per process, that a bfloat16 model sits where bfloat16 is slow.

    Nothing is measured for a model without bfloat16 parameters.
    """
    global _warned
    if _warned:
        return
    for parameter in plain_parameters(model):
        if parameter.dtype != torch.bfloat16 or parameter.device.type not in ("cpu", "cuda"):
            continue
        if type(parameter.data) is not Tensor:  # a fake or sharded one: nothing to time here
            return
        if (ratio := slow_bfloat16(parameter.device)) is not None:
            _warned = True
            warnings.warn(
                f"bfloat16 matrix products take {ratio:.3g} times as long as float32 ones on this "
                f"{parameter.device.type.upper()}. Load the model with dtype=torch.float32 "
                "(smt-ext: precision fp32, or auto).",
                stacklevel=3,
            )
        return


@cache
def _time_ratio(device: torch.device) -> float:
    """Seconds of the three products in bfloat16, over those in float32."""
    float32, bfloat16 = (
        sum(_seconds(call, device) for call in _products(device, dtype, _PROBE).values())
        for dtype in (torch.float32, torch.bfloat16)
    )
    return bfloat16 / float32


def _products(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], *, ours: bool = False
) -> dict[str, Callable[[], Tensor]]:
    # Ones, so that the caller's random state stays as it is.
    t, k, n = shape
    x, w, dy = (torch.ones(size, device=device, dtype=dtype) for size in ((t, k), (n, k), (t, n)))
    products = {"x @ w.T": lambda: x @ w.T, "dy @ w": lambda: dy @ w, "dy.T @ x": lambda: dy.T @ x}
    if ours:
        products["block_score_fused"] = lambda: ops.block_score_fused(dy, x, 64)
    return products


@torch.no_grad()
def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of five calls after a first one: the second may be cold still, and hide a slow rate.

    On the CPU in one thread and in its own CPU time, which other work on the machine cannot stretch.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    synchronize = getattr(torch, device.type).synchronize
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(6):
            synchronize()
            start = clock()
            call()
            synchronize()
            times.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])
