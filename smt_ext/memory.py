"""What training holds in memory."""

from __future__ import annotations

import ctypes
import platform
import resource
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes", "keep_freed_memory", "peak_rss"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed CPU tensors instead of returning it to the system.

    glibc maps every large tensor anew, and the kernel zeroes its pages one fault at a time: a
    quarter of a small model's training step on two cores. Kept, memory may fragment: the peak
    grows by some 10 to 20 %.

    Returns:
        whether the C library is one that can be told (glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


class SavedBytes:
    """Counts what autograd keeps for backward while the context is active::

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        print(saved.bytes)

    Each storage counts once and whole, however small the views of it; the model's own parameters and
    buffers do not count.

    Attributes:
        bytes: bytes of the storages.
    """

    def __init__(self, model: nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.bytes = 0

    def _count(self, tensor: Tensor) -> Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in self._known:
                self._known.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
