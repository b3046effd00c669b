"""Digests of a whole base model, tensor by tensor, so that the first one that differs has a name.

A tensor's digest is sha256 over its dtype, shape and the sha256 of every 16 MB of its bytes, which
threads compute side by side. Weights that train are digested as they were before training. The digest
of a matrix is kept as long as its memory is, and computed anew once its version or address has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import ops
from ..distributed import sharding
from ..nn.modules import SMTLayer, patch_record
from ..nn.other_parameters import persistent_buffers
from ..nn.patching import patched_root
from ..nn.quantized import SMTQuantizedLinear
from ..quantization import packed_weight

__all__ = ["digests_of_base", "weight_before_training"]

_CHUNK_BYTES = 16 << 20

# Storage and offset -> that storage, what the tensor there was when it was digested, and its digest. A
# weak reference to the tensor would forbid torch.utils.swap_tensors, by which modules are converted.
_kept: dict[tuple[int, int], tuple[StorageWeakRef, tuple[Any, ...], str]] = {}


def digests_of_base(
    model: nn.Module, *, leave_out: Collection[str] | None = None
) -> dict[str, Any]:
    """Digests of all parameters and persistent buffers of a patched model, as before training.

    A collective for a sharded model.

    Args:
        leave_out: names to leave out; default those of parameters that train beside the blocks without
            :func:`smt_ext.train_also`, since their values before training are unknown, and of buffers
            that have come since.

    Returns:
        ``tensors``, name -> digest; ``trained``, the names that were left out.
    """
    root = patched_root(model)
    sharding.reshard(root)
    patched = [m for m in root.modules() if isinstance(m, SMTLayer)]
    # Nothing writes into a quantised weight, so it is as it was.
    layers = {id(m.weight): m for m in patched if not isinstance(m, SMTQuantizedLinear)}
    blocks = {id(m.blocks) for m in patched}
    record = next(map(patch_record, patched), None)
    originals = {} if record is None else record.others.originals()
    buffers = {id(getattr(owner, key)) for _, owner, key in persistent_buffers(root)}
    for key in [key for key, (storage, _, _) in _kept.items() if storage.expired()]:
        del _kept[key]
    tensors: dict[str, str] = {}
    left_out = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in _persistent(root):
            if id(tensor) in blocks or tensor.is_meta:
                continue
            before = originals.get(id(tensor))
            changes = tensor.requires_grad or (record is not None and id(tensor) in buffers)
            unknown = changes and before is None
            if (unknown if leave_out is None else name in leave_out) and id(tensor) not in layers:
                left_out.append(name)
            elif before is not None:
                tensors[name] = _digest(before.to(tensor.dtype), None, pool)
            else:
                tensors[name] = _digest(tensor, layers.get(id(tensor)), pool)
    return {"tensors": tensors, "trained": left_out}


def _persistent(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_parameters()
    for prefix, module in root.named_modules():
        if (packed := packed_weight(module)) is not None:
            # Scales and tables, which no parameter shows.
            for name, tensor in packed.stored().items():
                yield f"{prefix}.weight[{name}]", tensor
    for name, owner, key in persistent_buffers(root):
        yield name, getattr(owner, key)


def _digest(tensor: Tensor, layer: SMTLayer | None, pool: ThreadPoolExecutor) -> str:
    mark = _mark(tensor, layer)
    held = sharding.local(tensor.detach()) if sharding.is_sharded(tensor) else tensor
    key = held.untyped_storage()._cdata, int(held.storage_offset())
    if mark is not None and key in _kept and _kept[key][1] == mark:
        return _kept[key][2]
    whole = sharding.full(tensor.detach()) if layer is None else weight_before_training(layer)
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)}".encode())
    for part in pool.map(_sha256, _chunks(whole)):
        digest.update(part)
    result = digest.hexdigest()
    if mark is not None:
        _kept[key] = (StorageWeakRef(held.untyped_storage()), mark, result)
    return result


def _mark(tensor: Tensor, layer: SMTLayer | None) -> tuple[Any, ...] | None:
    """Changes when the tensor does. Of a weight that trains, when anyone but training writes it.

    None where that is not known: writes into ``.data`` advance no version. Biases and norms, which are
    small, are digested each time.
    """
    if tensor.is_inference() or tensor.dim() <= 1:
        return None
    part = sharding.local(tensor.detach())
    kind = (part.data_ptr(), part.dtype, part.shape, part.stride())
    if layer is not None:
        layer.blocks_changed()  # which counts a weight that others have written
        return (*kind, layer.patch_number, layer.foreign_writes)
    return (*kind, tensor._version, part._version)


@torch.no_grad()
def weight_before_training(layer: SMTLayer) -> Tensor:
    """A copy of a layer's weight as it was before training; a collective if it is sharded."""
    copy = sharding.full(layer.weight.detach()).cpu().clone()
    matrix = copy.flatten(0, -2) if copy.dim() > 2 else copy.mT if layer.stored_transposed else copy
    ops.scatter_blocks_(
        matrix,
        layer.original_blocks.to(copy.dtype),
        layer.block_rows.cpu(),
        layer.block_cols.cpu(),
    )
    return copy


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = _plain(tensor).contiguous().flatten()
    size = max(1, _CHUNK_BYTES // max(1, flat.element_size()))
    return iter(flat.split(size))


def _plain(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that is made of others (quantised ones are), one behind the other."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    names, _ = tensor.__tensor_flatten__()
    parts = [
        _plain(getattr(tensor, name)).contiguous().flatten().view(torch.uint8) for name in names
    ]
    return torch.cat(parts)


def _sha256(chunk: Tensor) -> bytes:
    return hashlib.sha256(chunk.cpu().view(torch.uint8).numpy().data).digest()
