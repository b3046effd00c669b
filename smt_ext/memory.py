"""What training holds in memory."""

from __future__ import annotations

import ctypes
import platform
import resource
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .quantization import packed_weight

__all__ = ["AllocationLog", "SavedBytes", "held_tensors", "keep_freed_memory", "peak_rss"]

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


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what quantised weights keep beside them (scales, tables)."""
    packed = (packed_weight(module) for module in model.modules())
    beside = (tensor for weight in packed if weight for tensor in weight.tensors[1:])
    return [*model.parameters(), *model.buffers(), *beside]


class SavedBytes:
    """Counts what autograd keeps for backward, on the meta device too::

        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        print(saved.bytes)

    Counted is what is kept when the context ends, so the loss must be alive then. Each storage counts
    once and whole, however small the views of it; :func:`held_tensors` of the model do not count.

    Args:
        by_module: also note which module saved each storage first. Hooks every module meanwhile.

    Attributes:
        bytes: bytes of the storages.
        by_module: module name -> bytes, by the innermost module that ran; "" for the model's own
            forward. Empty unless asked for.
        storages: the storages counted, by ``untyped_storage()._cdata``.
    """

    def __init__(self, model: nn.Module, *, by_module: bool = False) -> None:
        # Identity, not address: on the meta device every address is 0.
        self._known = {tensor.untyped_storage()._cdata for tensor in held_tensors(model)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._model = model if by_module else None
        self._handles: list[RemovableHandle] = []
        self._running: list[str] = []
        # A weak reference keeps the identity of a storage that is gone from being given out again.
        self._noted: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.bytes = 0
        self.by_module: defaultdict[str, int] = defaultdict(int)
        self.storages: set[int] = set()

    def _note(self, tensor: Tensor) -> Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            key = storage._cdata
            if key not in self._known and key not in self._noted:
                module = self._running[-1] if self._running else ""
                self._noted[key] = StorageWeakRef(storage), storage.nbytes(), module
        return tensor

    def __enter__(self) -> SavedBytes:
        if self._model is not None:
            for name, module in self._model.named_modules():
                self._handles += [
                    module.register_forward_pre_hook(
                        lambda *_, name=name: self._running.append(name)
                    ),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for key, (reference, size, module) in self._noted.items():
            if not reference.expired():
                self.storages.add(key)
                self.bytes += size
                if self._model is not None:
                    self.by_module[module] += size

    def _leave(self, *_: Any) -> None:
        self._running.pop()


class AllocationLog(TorchDispatchMode):
    """Notes every storage that operators make while it is active, and when each is let go.

    What the log holds depends on shapes alone, so on the meta device it foretells what a real run
    would allocate. Working memory inside an operator is not seen.

    Args:
        known: tensors that exist already; their storages are left out.

    Attributes:
        sizes: bytes of each storage, in order of appearance.
        events: ``i + 1`` where storage i appeared, ``-(i + 1)`` where it was let go.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {id(s): s for s in (tensor.untyped_storage() for tensor in known)}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.sizes: list[int] = []
        self.events: list[int] = []

    def index_of(self, tensor: Tensor) -> int | None:
        """Which storage of the log a tensor lives in; None where it is not of the log."""
        found = self._live.get(id(tensor.untyped_storage()))
        return None if found is None else found[0]

    def live(self) -> dict[int, int]:
        """``untyped_storage()._cdata`` of the storages alive now -> their place in the log."""
        alive = ((index, ref()) for index, ref in self._live.values())
        return {storage._cdata: index for index, storage in alive if storage is not None}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = self._run(func, args, kwargs or {})
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known or key in self._live:
            return
        index = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.events.append(index + 1)

        def let_go(_: Any) -> None:
            del self._live[key]
            self.events.append(-(index + 1))

        # A storage keeps its Python object while it lives, so that its end is seen.
        self._live[key] = index, weakref.ref(storage, let_go)
