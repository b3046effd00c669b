"""Digests of a whole base model, tensor by tensor, so that the first one that differs has a name.

A tensor's digest is sha256 over its dtype, shape and the sha256 of every 16 MB of its bytes, which
threads compute side by side. Weights that train are digested as they were before training. Digests are
kept by the tensors' checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from ..distributed import sharding
from ..errors import PatchError
from ..nn.checksum import Checksum, bytes_of, checksum
from ..nn.modules import SMTLayer, patch_record
from ..nn.other_parameters import persistent_buffers
from ..nn.patching import patched_root
from ..nn.quantized import SMTQuantizedLinear
from ..quantization import packed_weight

__all__ = ["digest_of_config", "digests_of_base"]

_CHUNK_BYTES = 16 << 20

# Of a configuration: names, and what a trainer sets in it.
_NOT_COMPUTED = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "quantization_config", "transformers_version", "use_cache",
)  # fmt: skip
# By checksum; of a sharded tensor by that of all parts.
_kept: dict[tuple[Any, ...], str] = {}


def digest_of_config(config: Any) -> str | None:
    """Of all in a transformers configuration by which a model computes; None of any other."""
    if not hasattr(config, "to_diff_dict"):
        return None
    # Without defaults, of which another version has more.
    parts = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_COMPUTED}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


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

    Raises:
        PatchError: nothing was said to be left out, and a frozen parameter is other than it was when
            the model was patched, has come since or is gone: there is no such base. Of a sharded one
            it is not known what it was.
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
    frozen = None
    if record is not None and leave_out is None:
        frozen = record.others.checksums()
        held = {id(parameter) for parameter in root.parameters()}
        for owner, name, _ in record.others.sums:
            if id(getattr(owner, name, None)) not in held:
                raise _no_such_base(f"{name!r} of a {type(owner).__name__}", "is gone")
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
                tensors[name] = _digest(before.to(tensor.dtype), pool)
            else:
                layer = layers.get(id(tensor))
                part = None if layer is None else layer.weight_before_training()
                at_patch = None
                if frozen is not None and isinstance(tensor, nn.Parameter):
                    if id(tensor) not in frozen:
                        raise _no_such_base(repr(name), "has come")
                    at_patch = frozen[id(tensor)]
                tensors[name] = _digest(tensor, pool, part, name, at_patch)
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


def _digest(
    tensor: Tensor,
    pool: ThreadPoolExecutor,
    part: Tensor | None = None,
    name: str = "",
    at_patch: Checksum | None = None,
) -> str:
    """Of a tensor, or of the one whose ``part`` this rank holds, spread over ranks as the tensor is."""
    part = sharding.local(tensor.detach()) if part is None else part
    key: tuple[Any, ...] | None = checksum(part)
    if sharding.is_sharded(tensor):
        assert key is not None
        # Ranks gather together, or none does.
        key = (*key[:1], tuple(tensor.shape), "sharded", sharding.mixed_sum(key[2], tensor))
    elif at_patch is not None and key is not None and key[0] == at_patch[0] and key != at_patch:
        raise _no_such_base(repr(name), "is frozen, and has changed")
    if key in _kept:
        return _kept[key]
    whole = sharding.full(sharding.like(part, tensor))
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)}".encode())
    for sha in pool.map(_sha256, bytes_of(whole).split(_CHUNK_BYTES)):
        digest.update(sha)
    result = digest.hexdigest()
    if key is not None:
        _kept[key] = result
    return result


def _no_such_base(name: str, what: str) -> PatchError:
    return PatchError(
        f"{name} {what} since smt_ext.patch: what is saved would belong to a base model that nobody has."
        " Change a model before patch. What changes during training, let train: smt_ext.train_also("
        "model, [name]) right after patch; requires_grad_(False) then hides it from optimizers. "
        "Weights with blocks can change in their blocks alone."
    )


def _sha256(chunk: Tensor) -> bytes:
    return hashlib.sha256(chunk.cpu().numpy().data).digest()
