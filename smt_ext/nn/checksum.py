"""A checksum of a tensor's bits where the tensor is, to notice what version counters do not show.

A frozen weight may be written through ``.data``, through numpy or by ``torch.distributed``, none of
which advances a version. Against chance, not against malice: files are bound by sha256.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import sharding

__all__ = ["Checksum", "bytes_of", "checksum"]

# dtype, shape, sum.
Checksum = tuple[torch.dtype, tuple[int, ...], int]

_CHUNK_WORDS = 1 << 18
_PLACES = 1 << 12
_NEXT_CHUNK = 0x5851F42D4C957F2D


@torch.no_grad()
def checksum(tensor: Tensor) -> Checksum | None:
    """Sum of words of eight bytes, each times an odd number of its place; None without values.

    In wrapping int64: no order of additions changes it. Of a sharded tensor this rank's part.
    """
    part = sharding.local(tensor.detach())
    flattens = hasattr(part, "__tensor_flatten__")
    if part.is_meta or not (flattens or part.layout == torch.strided):
        return None
    flat = bytes_of(part)
    words = flat.numel() // 8 * 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    places = _places(flat.device)
    for chunk in flat[:words].view(torch.int64).split(_CHUNK_WORDS):
        # Times an odd number the highest bit of a word is itself: an even number of changed signs would
        # go unseen. So upper bits are mixed into lower ones, by a distance that no dtype's signs have.
        mixed = (chunk >> 29).bitwise_and_((1 << 35) - 1).bitwise_xor_(chunk)
        rows = F.pad(mixed, (0, -len(mixed) % _PLACES)).view(-1, _PLACES)
        sums = rows.mul_(places).sum(1)
        total = total * _NEXT_CHUNK + (sums * places[: len(sums)]).sum()
    rest = flat[words:].to(torch.int64)
    total = total * _NEXT_CHUNK + (rest * places[: len(rest)]).sum()
    return tensor.dtype, tuple(tensor.shape), int(total)


def bytes_of(tensor: Tensor) -> Tensor:
    """Flat; of a tensor that is made of others (quantised ones are) theirs, one behind the other."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.contiguous().flatten().view(torch.uint8)
    names, _ = tensor.__tensor_flatten__()
    return torch.cat([bytes_of(getattr(tensor, name)) for name in names])


@cache
def _places(device: torch.device) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (_PLACES,), generator=draws)
    return (numbers | 1).to(device)
