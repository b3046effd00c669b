"""Several processes that work together: sums over ranks, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointError

__all__ = [
    "gather_objects",
    "is_main",
    "process_group",
    "raise_together",
    "rank",
    "sum_over_ranks",
    "together",
    "world_size",
]

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def process_group() -> dist.ProcessGroup | None:
    """All ranks; None where there is one alone."""
    return dist.group.WORLD if world_size() > 1 else None


def is_main() -> bool:
    """Whether this is rank 0, or there are no ranks."""
    return rank() == 0


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None, kind: type[Exception]) -> None:
    """Raise on all ranks if one has an error, so that none waits in a collective for the others.

    Raises:
        the rank's own error, or ``kind`` with the other rank's message.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise kind(f"failed on rank {other}: {message}")


def together(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on every rank, in the order of ranks; its error on one is everybody's.

    Raises:
        the rank's own error, or a CheckpointError with the other rank's message.
    """
    error, value = None, None
    try:
        value = work()
    except Exception as raised:
        error = raised
    raise_together(error, CheckpointError)
    return gather_objects(value)


def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over all ranks, the same bits on every rank; the tensors have one dtype."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    device = flat.device
    if dist.get_backend() == "nccl" and device.type == "cpu":
        flat = flat.cuda()
    # Not an all-reduce: that each rank gets the same bits from one is up to the backend.
    dist.reduce(flat, dst=0)
    dist.broadcast(flat, src=0)
    parts = flat.to(device).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
