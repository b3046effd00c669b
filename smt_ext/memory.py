"""What training holds in memory."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes", "peak_rss"]


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


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
