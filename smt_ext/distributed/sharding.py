"""Blocks and weights that FSDP2 (``torch.distributed.fsdp.fully_shard``) has sharded over ranks.

``fully_shard`` turns the frozen weight of a patched layer and its ``blocks`` (S, L, L) into DTensors,
each cut along its first dimension: a rank holds some rows of the weight as it is stored (output
features of an nn.Linear, input features of a Conv1D, whole experts), and some whole blocks with their
gradients and moments. A block's owner is seldom the rank whose rows it covers, and a block may straddle
two ranks' rows. So after an update the blocks are gathered, in the dtype of the weight, and every rank
writes those of their rows that it holds.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..errors import PatchError
from ..plan import LayerPlan

# DTensor and FSDP are imported by who shards, never here: with them comes sympy, and a second.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "HeldRows",
    "full",
    "full_each",
    "global_grad_norm",
    "is_fsdp",
    "is_sharded",
    "like",
    "local",
    "mixed_sum",
    "replica_groups",
    "reshard",
    "shard_of",
    "shard_rank",
]

# Gathered at once; what it costs in memory while it lasts.
_BUCKET_BYTES = 32 << 20


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    return _is_dtensor(tensor)


def is_fsdp(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a part of the model, or on itself."""
    return any(True for _ in _fsdp_modules(model))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank. A collective for a sharded one: all ranks must call."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def full_each(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Whole tensors (S, ...) on every rank, from each rank's parts of them.

    A collective for every 32 MB instead of one for every tensor.

    Args:
        tensors: cut along the first dimension, as ``fully_shard`` does.
        parts: this rank's part of each, of any dtype.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    size = 0
    for tensor, part in zip(tensors, parts, strict=True):
        if waiting and (size > _BUCKET_BYTES or _home(waiting[0]) != _home((tensor, part))):
            yield from _gather(waiting)
            waiting, size = [], 0
        waiting.append((tensor, part))
        size += tensor.numel() * part.element_size()
    if waiting:
        yield from _gather(waiting)


def like(local_part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor spread as ``tensor`` is, from each rank's part of it."""
    if not _is_dtensor(tensor):
        return local_part
    return type(tensor).from_local(
        local_part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def shard_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of ``whole``, cut as ``tensor`` is; a view."""
    if not _is_dtensor(tensor):
        return whole
    shape, offset = _extent(tensor)
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]


def shard_rank(tensor: Tensor) -> int:
    """Which of the shards this rank holds; ranks with replicas of one shard have the same number."""
    if not _is_dtensor(tensor):
        return 0
    number = 0
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def mixed_sum(number: int, tensor: Tensor) -> int:
    """One number of each shard's, the same on all ranks; shards count by their place. A collective."""
    total = torch.tensor(number, device=local(tensor).device) * (2 * shard_rank(tensor) + 1)
    for group in _shard_groups(tensor):
        dist.all_reduce(total, group=group)
    return int(total)


def reshard(model: nn.Module, *, drain: bool = False) -> None:
    """Put every parameter back into its shards.

    After a forward without backward ``fully_shard`` leaves the root's parameters gathered, as plain
    tensors; what is written into those is lost.

    Args:
        drain: also end what is being gathered ahead of its use; a collective.
    """
    for module in _fsdp_modules(model):
        if drain:
            module.unshard()
        module.reshard()


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and dist.is_initialized():
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


class HeldRows:
    """The blocks of one weight as far as this rank's rows reach.

    Rows [start, stop) of the stored matrix begin anywhere in the grid of blocks. They fall into a
    head, up to the next multiple of L, which holds lower parts of one row of blocks, and the rest,
    which is a grid of its own whose last row of blocks may be cut off. The block kernels handle each
    as a small weight with ragged edges.

    Args:
        name: of the layer, for messages.
        weight: the parameter as it is stored: (N, K), (K, N) if ``transposed``, or the matrices of
            all experts, (E, N, K), which count as one of shape (E * N, K).
        layer: its part of the plan, in terms of (N, K).
    """

    def __init__(self, name: str, weight: Tensor, layer: LayerPlan, transposed: bool) -> None:
        from torch.distributed.tensor import Shard

        assert _is_dtensor(weight)
        if any(not (p.is_replicate() or p == Shard(0)) for p in weight.placements):
            raise PatchError(
                f"the weight of {name!r}, of shape {tuple(weight.shape)}, has placements "
                f"{weight.placements}, expected Shard(0), with Replicate() for hybrid sharding. "
                "smt_ext supports fully_shard without a shard_placement_fn of its own for patched "
                "weights; tensor parallelism is not supported."
            )
        shape, offset = _extent(weight)
        # Of rows; a shard of experts has N for each.
        height, start = math.prod(shape[:-1]), offset[0] * math.prod(weight.shape[1:-1])
        size = layer.block_size
        self.num_blocks = len(layer.blocks)
        self.block_size = size
        self.transposed = transposed
        # Row of the rank's part, row within the block, blocks by number, grid rows, grid columns.
        self._pieces: list[tuple[slice, int, Tensor, Tensor, Tensor]] = []
        stored = [(c, r) for r, c in layer.blocks] if transposed else layer.blocks
        head = min(-start % size, height)
        for rows, shift in ((slice(0, head), start % size), (slice(head, height), 0)):
            first, last = start + rows.start, start + rows.stop
            held = [
                (number, row - first // size, col)
                for number, (row, col) in enumerate(stored)
                if first // size <= row and row * size < last
            ]
            if rows.stop > rows.start and held:
                numbers, grid_rows, grid_cols = zip(*held, strict=True)
                device = weight.device
                self._pieces.append(
                    (
                        rows,
                        shift,
                        torch.tensor(numbers, dtype=torch.int64, device=device),
                        torch.tensor(grid_rows, dtype=torch.int32, device=device),
                        torch.tensor(grid_cols, dtype=torch.int32, device=device),
                    )
                )

    def write_(self, weight: Tensor, blocks: Tensor, *, bump_version: bool = True) -> None:
        """Write blocks (S, L, L), whole on every rank, as far as they fall into this rank's rows."""
        part = local(weight).flatten(0, -2)
        for rows, shift, numbers, grid_rows, grid_cols in self._pieces:
            held = blocks.index_select(0, numbers)
            if self.transposed:
                held = held.mT
            if shift:
                held = torch.roll(held, -shift, dims=1)  # rows that wrap around lie below the head
            ops.scatter_blocks_(part[rows], held, grid_rows, grid_cols, bump_version=bump_version)

    def read(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The blocks (S, L, L) as far as they fall into this rank's rows, zero elsewhere."""
        part = local(weight).flatten(0, -2)
        size = self.block_size
        out = part.new_zeros((self.num_blocks, size, size), dtype=dtype)
        for rows, shift, numbers, grid_rows, grid_cols in self._pieces:
            held = ops.gather_blocks(part[rows], grid_rows, grid_cols, size, dtype)
            if shift:
                held = torch.roll(held, shift, dims=1)
            out.index_copy_(0, numbers, held.mT if self.transposed else held)
        return out

    def read_full(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The blocks (S, L, L) on every rank; a collective."""
        out = self.read(weight, dtype)
        # Each entry comes from one rank and is zero on the others: as bytes, the sum is exact.
        for group in _shard_groups(weight):
            dist.all_reduce(out.view(torch.uint8), group=group)
        return out


def global_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients and, for sharded ones, all ranks; 0-dim float64.

    A collective where gradients are sharded. Not finite iff some entry on some rank is not.
    """
    by_home: defaultdict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        home = (grad.device_mesh, grad.placements) if _is_dtensor(grad) else grad.device
        by_home[home].append(grad)
    norms = []
    for same in by_home.values():
        parts = [part for part in map(local, same) if part.numel()]
        zero = torch.zeros((), dtype=torch.float64, device=same[0].device)
        norm = ops.grad_norm(parts) if parts else zero
        if groups := _shard_groups(same[0]):
            square = norm.square()
            for group in groups:
                dist.all_reduce(square, group=group)
            norm = square.sqrt()
        norms.append(norm.to(grads[0].device))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def replica_groups(tensors: Sequence[Tensor]) -> list[dist.ProcessGroup]:
    """The groups of ranks that hold the same shards of these tensors (hybrid sharding)."""
    meshes = {tensor.device_mesh: tensor for tensor in tensors if _is_dtensor(tensor)}
    return [
        mesh.get_group(dim)
        for mesh, tensor in meshes.items()
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    ]


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _home(pair: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """What tensors that are gathered together have in common."""
    tensor, part = pair
    assert _is_dtensor(tensor)
    return tensor.device_mesh, tensor.placements, part.dtype, part.device


def _gather(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    (group,) = _shard_groups(pairs[0][0])
    world = dist.get_world_size(group)
    # As torch.chunk cuts: the first ranks have parts of this length, then one less, the others none.
    lengths = [-(-t.shape[0] // world) * t.shape[1:].numel() for t, _ in pairs]
    own = pairs[0][1].new_empty(sum(lengths))
    for (_, part), padded in zip(pairs, own.split(lengths), strict=True):
        padded[: part.numel()].copy_(part.flatten())
    every = own.new_empty(world * own.numel())
    dist.all_gather_into_tensor(every, own, group=group)
    by_rank = every.view(world, -1).split(lengths, dim=1)
    for (tensor, _), padded in zip(pairs, by_rank, strict=True):
        yield padded.flatten()[: tensor.numel()].view(tensor.shape)


def _extent(tensor: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Shape of this rank's part, and where it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )


def _shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The groups of ranks whose parts together make up the tensor."""
    if not _is_dtensor(tensor):
        return []
    mesh = tensor.device_mesh
    return [mesh.get_group(dim) for dim, p in enumerate(tensor.placements) if p.is_shard()]
