"""Several trained sets of blocks on one base model, switched in place and bit for bit.

A set is what :func:`smt_ext.save_blocks` wrote. Loading one by name keeps it on the CPU, beside the
base model's own values of those blocks, and leaves the model an ordinary one: its classes,
parameters and state dict do not change. Activating writes the set's blocks into the weights,
deactivating writes the base's back, so forward is one ordinary matmul at all times.

Sets are for inference. A model with an active set cannot be patched (training would take the set
for the base), and while it is patched no set can be activated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PatchError
from ..layouts import ExpertMatrix, Matrix, find_matrix, is_supported, weight_NK
from ..nn.modules import within_range
from ..nn.patching import ACTIVE_BLOCKS, smt_modules
from ..plan import BlockPlan, LayerPlan

__all__ = [
    "BlockSet",
    "activate",
    "active_blocks",
    "add_block_set",
    "base_weights",
    "block_set",
    "check_free",
    "deactivate",
    "loaded_blocks",
    "merge_blocks",
    "remove_blocks",
]

# In the __dict__ of the model that the sets were loaded onto: dict[str, BlockSet]. The name of the
# active one is there too, and in each layer that it has changed, under patching.ACTIVE_BLOCKS.
_SETS = "_smt_block_sets"


@dataclass(frozen=True)
class BlockSet:
    """Trained blocks on the CPU, and what the base model holds in their place.

    Attributes:
        plan: which blocks.
        blocks: module name -> (S, L, L), the values to activate, in the dtype they were saved in.
        originals: module name -> (S, L, L), the base model's, in the dtype of its weights.
    """

    plan: BlockPlan
    blocks: Mapping[str, Tensor]
    originals: Mapping[str, Tensor]


def loaded_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the block sets that are loaded onto the model, oldest first."""
    return tuple(_sets(_root(model)))


def active_blocks(model: nn.Module) -> str | None:
    """Name of the active block set; None while the weights are the base model's."""
    name: str | None = _root(model).__dict__.get(ACTIVE_BLOCKS)
    return name


def activate(model: nn.Module, name: str) -> nn.Module:
    """Write a loaded set's blocks into the weights, in place; another active set gives way.

    Whatever was active before, the weights are then those of the base model with this set's blocks,
    bit for bit. Reads and writes S x L x L entries a layer, and copies them to the model's device.

    Args:
        model: the model that ``smt_ext.load_blocks(model, directory, name=name)`` was called on.
        name: of the set.

    Returns:
        ``model``.

    Raises:
        PatchError: no such set; the model is patched; or a weight has changed since, so that the
            blocks would not meet their base. The model is left as it was.
    """
    chosen = block_set(model, name)
    root = _root(model)
    if patched := next(iter(smt_modules(root)), None):
        raise PatchError(
            f"cannot activate {name!r}: the model is patched for training (first {patched!r}), and "
            "a set would overwrite what it trains. Call smt_ext.unpatch(model) first."
        )
    previous = active_blocks(root)
    if previous == name:
        return model
    deactivate(root)
    try:
        _check_holds(root, chosen, chosen.originals, f"block set {name!r} was loaded")
    except PatchError:
        if previous is not None:
            _write(root, _sets(root)[previous].blocks, _sets(root)[previous], previous)
        raise
    _write(root, chosen.blocks, chosen, name)
    return model


def deactivate(model: nn.Module) -> nn.Module:
    """Write the base model's own values back, bit for bit. Nothing to do if no set is active.

    Raises:
        PatchError: a weight has changed since the set was activated (other weights were loaded, or
            trained), so that the base is not to be had this way. The model is left as it was.
    """
    name = active_blocks(model)
    if name is None:
        return model
    root, active = _root(model), block_set(model, name)
    _check_holds(root, active, active.blocks, f"block set {name!r} was activated")
    _write(root, active.originals, active, None)
    return model


def remove_blocks(model: nn.Module, name: str) -> nn.Module:
    """Forget a loaded set and free its memory; an active one is deactivated first.

    Raises:
        PatchError: no such set, or see :func:`deactivate`.
    """
    block_set(model, name)
    if active_blocks(model) == name:
        deactivate(model)
    root = _root(model)
    del _sets(root)[name]
    if not _sets(root):
        del root.__dict__[_SETS]
    return model


def merge_blocks(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    overlap: Literal["error", "sum"] = "error",
) -> nn.Module:
    """Make a new set out of several loaded ones: base + sum of weight x (set - base).

    Computed in float64 and rounded once. A block that only one set holds, with weight 1, is taken
    over bit for bit.

    Args:
        weights: set name -> factor of its change, such as ``{"math": 0.7, "code": 0.3}``.
        name: of the new set, which is loaded and not yet active.
        overlap: what to do with blocks that several sets have trained. ``"error"`` names them;
            ``"sum"`` adds the weighted changes (task arithmetic).

    Returns:
        ``model``.

    Raises:
        PatchError: no such set, a name that is taken, sets with other block sizes or base values, or
            overlapping blocks.
        ValueError: no weights, or one that is not a finite number; an unknown ``overlap``.
    """
    if overlap not in ("error", "sum"):
        raise ValueError(f"overlap is {overlap!r}, expected 'error' or 'sum'.")
    if not weights:
        raise ValueError("weights is empty, expected the name and factor of at least one set.")
    for member, weight in weights.items():
        if not abs(weight) < float("inf"):
            raise ValueError(f"weights[{member!r}] is {weight}, expected a finite number.")
    members = {member: block_set(model, member) for member in weights}
    if overlap == "error":
        _check_disjoint(members)
    add_block_set(model, name, _merge(members, weights))
    return model


def block_set(model: nn.Module, name: str) -> BlockSet:
    """A loaded set.

    Raises:
        PatchError: no such set.
    """
    sets = _sets(_root(model))
    if name not in sets:
        loaded = f"loaded are {', '.join(map(repr, sets))}" if sets else "none is loaded"
        raise PatchError(
            f"no block set {name!r} on this {type(model).__name__}: {loaded}. Load it with "
            f"smt_ext.load_blocks(model, directory, name={name!r})."
        )
    return sets[name]


def add_block_set(model: nn.Module, name: str, new: BlockSet) -> None:
    """Keep a set under a name, not yet active.

    Raises:
        PatchError: the name is taken.
    """
    root = _root(model)
    check_free(root, name)
    root.__dict__.setdefault(_SETS, {})[name] = new


def check_free(model: nn.Module, name: str) -> None:
    """Raise PatchError if a set of this name is loaded, ValueError if it is no name."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}, expected a text that is not empty.")
    if name in _sets(_root(model)):
        raise PatchError(
            f"a block set {name!r} is loaded already. Choose another name, or call "
            f"smt_ext.block_sets.remove_blocks(model, {name!r}) first."
        )


@contextmanager
def base_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, no set is active; afterwards the one that was is so again.

    Raises:
        PatchError: see :func:`deactivate`.
    """
    previous = active_blocks(model)
    deactivate(model)
    try:
        yield model
    finally:
        if previous is not None:
            activate(model, previous)


def _root(model: nn.Module) -> nn.Module:
    """The model that the sets were loaded onto: ``model``, or one inside a wrapper."""
    return next((m for m in model.modules() if _SETS in m.__dict__), model)


def _sets(root: nn.Module) -> dict[str, BlockSet]:
    sets: dict[str, BlockSet] = root.__dict__.get(_SETS, {})
    return sets


def _layers(root: nn.Module, block_set: BlockSet) -> dict[str, Matrix]:
    """What the set was loaded onto, by name in its plan.

    Raises:
        PatchError: one is gone, or is something else now.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    found = {}
    for name in block_set.blocks:
        matrix, shape = find_matrix(modules, name), block_set.plan.layers[name].shape
        known = matrix is not None and is_supported(matrix)
        if matrix is None or not known or tuple(weight_NK(matrix).shape) != shape:
            now = "gone" if matrix is None else f"a {type(_holder(matrix)).__name__}"
            if matrix is not None and known:
                now += f" of shape {tuple(weight_NK(matrix).shape)}"
            raise PatchError(
                f"{name!r} held a weight of shape {shape} when its block set was loaded, and is "
                f"{now} now. Load block sets after the model has taken its final form."
            )
        found[name] = matrix
    return found


def _holder(matrix: Matrix) -> nn.Module:
    return matrix.experts if isinstance(matrix, ExpertMatrix) else matrix


def _grid(layer: LayerPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block rows and columns, (S,) int32 each."""
    index = torch.tensor(layer.blocks, dtype=torch.int32, device=device).reshape(-1, 2)
    return index[:, 0].contiguous(), index[:, 1].contiguous()


@torch.no_grad()
def _check_holds(
    root: nn.Module, block_set: BlockSet, expected: Mapping[str, Tensor], since: str
) -> None:
    """Raise PatchError unless the weights hold the expected blocks."""
    for name, matrix in _layers(root, block_set).items():
        layer, blocks = block_set.plan.layers[name], expected[name]
        weight = weight_NK(matrix).detach()
        found = ops.gather_blocks(weight, *_grid(layer, weight.device), layer.block_size)
        # As the weight had it when the set was loaded, and then as the model was converted.
        rounded = _rounded(blocks, block_set.originals[name].dtype)
        wanted = rounded.to(weight.device, weight.dtype)
        if not torch.equal(found, wanted) and not _same_with_nans(found, wanted):
            raise PatchError(
                f"the weight of {name!r} has changed since {since}: other weights were loaded, or it "
                "was trained. Load the base model and its block sets again."
            )


def _rounded(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return within_range(blocks, dtype).to(dtype)


def _same_with_nans(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


@torch.no_grad()
def _write(
    root: nn.Module, values: Mapping[str, Tensor], block_set: BlockSet, active: str | None
) -> None:
    layers = _layers(root, block_set)
    for name, matrix in layers.items():
        layer, weight = block_set.plan.layers[name], weight_NK(matrix).detach()
        rounded = _rounded(values[name], block_set.originals[name].dtype)
        ops.scatter_blocks_(weight, rounded.to(weight.device), *_grid(layer, weight.device))
    for holder in (root, *map(_holder, layers.values())):
        if active is None:
            holder.__dict__.pop(ACTIVE_BLOCKS, None)
        else:
            holder.__dict__[ACTIVE_BLOCKS] = active


def _check_disjoint(members: Mapping[str, BlockSet]) -> None:
    holder: dict[tuple[str, tuple[int, int]], str] = {}
    for member, each in members.items():
        held = {(name, b) for name in each.blocks for b in each.plan.layers[name].blocks}
        if shared := sorted(held & holder.keys()):
            name, block = shared[0]
            others = sorted({holder[key] for key in shared})
            raise PatchError(
                f"block sets {', '.join(map(repr, others))} and {member!r} have both trained "
                f"{len(shared)} of the same blocks (first: {name!r} block {block}). "
                "merge_blocks(..., overlap='sum') adds their weighted changes; plans for disjoint "
                "sets avoid it."
            )
        holder.update(dict.fromkeys(held, member))


def _merge(members: Mapping[str, BlockSet], weights: Mapping[str, float]) -> BlockSet:
    layers, blocks, originals = {}, {}, {}
    for name in sorted({name for each in members.values() for name in each.blocks}):
        holding = {member: each for member, each in members.items() if name in each.blocks}
        layers[name], blocks[name], originals[name] = _merge_layer(name, holding, weights)
    return BlockSet(BlockPlan(layers), blocks, originals)


def _merge_layer(
    name: str, members: Mapping[str, BlockSet], weights: Mapping[str, float]
) -> tuple[LayerPlan, Tensor, Tensor]:
    """The union of the members' blocks of one layer, (S, L, L): plan, merged and original values."""
    plans = {member: each.plan.layers[name] for member, each in members.items()}
    sizes = {member: plan.block_size for member, plan in plans.items()}
    if len(set(sizes.values())) > 1:
        raise PatchError(
            f"the sets have blocks of different sizes in {name!r} "
            f"({', '.join(f'{m!r}: {size}' for m, size in sizes.items())}), and merging needs one."
        )
    first = next(iter(plans.values()))
    union = LayerPlan(
        first.shape, first.block_size, tuple(sorted({b for p in plans.values() for b in p.blocks}))
    )
    place = {block: i for i, block in enumerate(union.blocks)}
    places = {m: torch.tensor([place[b] for b in plan.blocks]) for m, plan in plans.items()}

    dtype = next(iter(members.values())).blocks[name].dtype
    for each in members.values():
        dtype = torch.promote_types(dtype, each.blocks[name].dtype)
    original = _union_of_originals(name, members, places, len(union.blocks))
    change = torch.zeros(original.shape, dtype=torch.float64)
    holders = torch.zeros(len(union.blocks), dtype=torch.int64)
    for member, each in members.items():
        moved = each.blocks[name].double() - each.originals[name].double()
        change.index_add_(0, places[member], weights[member] * moved)
        holders.index_add_(0, places[member], torch.ones_like(places[member]))
    merged = (original.double() + change).to(dtype)
    for member, each in members.items():
        if weights[member] == 1:
            alone = holders[places[member]] == 1
            merged[places[member][alone]] = each.blocks[name][alone].to(dtype)
    return union, merged, original


def _union_of_originals(
    name: str, members: Mapping[str, BlockSet], places: Mapping[str, Tensor], count: int
) -> Tensor:
    some = next(iter(members.values())).originals[name]
    original = torch.zeros((count, *some.shape[1:]), dtype=some.dtype)
    filled = torch.zeros(count, dtype=torch.bool)
    for member, each in members.items():
        where = places[member]
        both = filled[where]
        mine = each.originals[name]
        if mine.dtype != some.dtype or not torch.equal(original[where[both]], mine[both]):
            raise PatchError(
                f"block set {member!r} was loaded onto other base values of {name!r} than the sets "
                "before it: the model has changed in between. Load the base model and its block "
                "sets again."
            )
        original[where] = mine
        filled[where] = True
    return original
