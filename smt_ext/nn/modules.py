"""The patched linear layers, and the input columns that layers reading the same tensor share."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .. import ops
from ..distributed import sharding
from ..errors import PatchError
from ..layouts import Conv1DLayout, LinearLayout, Matrix, restore_class_, swap_class_, weight_NK
from ..plan import LayerPlan
from .functional import WeightState, autocast_dtype, linear, smt_linear
from .siblings import Place, SharedLaunch, Siblings
from .tiles import tiles_of

__all__ = [
    "BlocksParameter",
    "InputGroup",
    "SMTConv1D",
    "SMTLayer",
    "SMTLinear",
    "live_modules",
    "patch_record",
    "within_range",
    "write_blocks_of",
    "write_changed_blocks_of",
]

# Every patched layer alive, so that an optimizer's step hook finds the layers that own the blocks
# it has just updated. Modules hash by identity; unpickled and deep-copied ones join by themselves.
_LIVE: weakref.WeakSet[SMTLayer] = weakref.WeakSet()


def live_modules() -> list[SMTLayer]:
    """All patched layers that exist in this process."""
    return list(_LIVE)


def patch_record(module: nn.Module) -> Any:
    """What all SMT layers of a model share (``patching.Patch``); None for any other module."""
    return module.__dict__.get("_smt_patch")


def write_changed_blocks_of(modules: Iterable[SMTLayer]) -> None:
    """Bring those weights up to date whose blocks have changed since they were last written.

    For sharded layers a collective where blocks have changed, which all ranks must have done alike.
    """
    if changed := [module for module in modules if module.blocks_changed()]:
        for module in changed:
            module.check_trained()
        write_blocks_of(changed)


@torch.no_grad()
def write_blocks_of(modules: Iterable[SMTLayer]) -> None:
    """Write the trained blocks of several layers into their weights.

    For sharded layers a collective: all ranks pass the same layers in the same order.
    """
    sharded = []
    for module in modules:
        if sharding.is_sharded(module.blocks):
            sharded.append(module)
        else:
            module.write_blocks_()
    blocks = [module.blocks.detach() for module in sharded]
    # Rounded to the weight's dtype first: fewer bytes travel.
    parts = [
        within_range(sharding.local(b), m.weight.dtype).to(m.weight.dtype)
        for b, m in zip(blocks, sharded, strict=True)
    ]
    for module, whole in zip(sharded, sharding.full_each(blocks, parts), strict=True):
        module.write_blocks_(whole)
        module.note_written()


def _index(layer: LayerPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each block, (S,) int32."""
    rows, cols = torch.tensor(layer.blocks, dtype=torch.int32).reshape(-1, 2).T.contiguous()
    return rows.to(device), cols.to(device)


def _name(layer: SMTLayer) -> str:
    return layer.layer_name


def _is_plain(tensor: Tensor) -> bool:
    """Whether its version counter is its own; FSDP1 has views."""
    return type(tensor) in _PLAIN and not tensor._is_view()


def within_range(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite numbers too large for float16 become its largest, as in the optimizer's kernel."""
    if dtype != torch.float16 or blocks.dtype == dtype:
        return blocks
    limit = torch.finfo(dtype).max
    return torch.where(blocks.isinf(), blocks, blocks.clamp(-limit, limit))


# Entries of x times in_features from which on a GPU is busy with a linear's forward and dX (some 0.1 ms
# on an H100) for longer than Python with their calls. The shared launch's own calls, some 0.05 ms, cost
# nothing there; in smaller layers they would. Estimated, not measured on a GPU.
_LEAST_PRODUCTS = 2**34


def _gains_by_one_launch(x: Tensor) -> bool:
    """Whether siblings that read ``x`` shall compute their blocks' gradients together.

    One launch fills a GPU better than several. On CPUs nothing is gained, and the gradients of
    outputs would live a little longer.
    """
    return x.device.type == "cuda" and x.numel() * x.shape[-1] >= _LEAST_PRODUCTS


def _is_all_of_its_memory(x: Tensor) -> bool:
    """Whether keeping ``x`` keeps nothing else. False while compiling: strides may be symbols."""
    return (
        not torch.compiler.is_compiling()
        and x.is_contiguous()
        and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    )


@dataclass
class _Gathered:
    """Columns of one input, and which members have fetched them."""

    x: weakref.ref[Tensor]
    version: int  # of the input; -1 where it has none
    x_cols: Tensor
    readers: set[int]
    places: dict[int, Place] = field(default_factory=dict)  # of members that have not fetched them

    def is_of(self, x: Tensor, dtype: torch.dtype) -> bool:
        same = self.x() is x and self.x_cols.dtype == dtype
        return same and not x.is_inference() and self.version == x._version


class InputGroup:
    """Linears that read the same input tensor share one gathered copy of its columns.

    Within one forward the first member gathers the union of the members' columns, the others, in the
    same thread and each once, find it here. Being the same tensor is checked at run time by identity and
    version, so that a group that was guessed wrongly costs memory but never correctness.

    Attributes:
        col_blocks: (C,) int32, sorted union of the members' column-block indices.
        block_size: L, the same for all members.
        in_features: K.
        width: U, the number of columns gathered.
        size: number of members; the copy is let go once all of them have fetched it.
    """

    _slot_of: dict[int, int]
    _held: dict[int, _Gathered]  # by thread
    _members: list[weakref.ref[SMTLayer]] | None  # by name; None: not looked for
    _siblings: dict[Any, Siblings]  # by device and names of those that launch together

    def __init__(self, members: Sequence[LayerPlan]) -> None:
        (self.block_size,) = {layer.block_size for layer in members}
        (self.in_features,) = {layer.shape[1] for layer in members}
        union = sorted({col for layer in members for _, col in layer.blocks})
        self.col_blocks = torch.tensor(union, dtype=torch.int32)
        self.width = ops.columns_width(self.col_blocks, self.block_size, self.in_features)
        self._slot_of = {col: slot for slot, col in enumerate(union)}
        self.size = len(members)
        self._forget()

    def slots(self, layer: LayerPlan) -> Tensor:
        """Position of each of the layer's blocks within the gathered columns, (S,) int32."""
        return torch.tensor([self._slot_of[col] for _, col in layer.blocks], dtype=torch.int32)

    def tiles(self, layer: LayerPlan, *, tall: bool) -> tuple[Tensor | None, Tensor | None]:
        """Which of the layer's blocks are multiplied together: :func:`~smt_ext.nn.tiles.tiles_of`."""
        slots = [self._slot_of[col] for _, col in layer.blocks]
        return tiles_of([row for row, _ in layer.blocks], slots, self.block_size, tall=tall)

    def columns(self, x: Tensor, dtype: torch.dtype, reader: int = 0) -> Tensor:
        """The selected columns of ``x`` (..., K) as a tensor (T, U) of ``dtype``, for one member.

        A copy, so that ``x`` can be let go; where all columns are selected, ``x`` itself, which then
        must not be changed in place before backward (autograd notices).
        """
        if self._is_by_itself():
            return self._gather(x, dtype)
        return self._fetch(x, dtype, reader).x_cols

    def columns_and_place(
        self, x: Tensor, dtype: torch.dtype, layer: SMTLayer
    ) -> tuple[Tensor, Place | None]:
        """:meth:`columns`, and the layer's place in a launch with its siblings, if it has one."""
        if self._is_by_itself():
            return self._gather(x, dtype), None
        held = self._fetch(x, dtype, id(layer))
        return held.x_cols, self._place(held, layer) if _gains_by_one_launch(x) else None

    def _is_by_itself(self) -> bool:
        # The compiler merges the members' identical gathers of one tensor by itself (common
        # subexpressions), and must not see Python objects that change within the graph.
        return self.size == 1 or torch.compiler.is_compiling()

    def _fetch(self, x: Tensor, dtype: torch.dtype, reader: int) -> _Gathered:
        thread = threading.get_ident()
        held = self._held.get(thread)
        if held is not None and held.is_of(x, dtype) and reader not in held.readers:
            held.readers.add(reader)
            if len(held.readers) == self.size:
                del self._held[thread]
            return held
        x_cols = self._gather(x, dtype)

        def forget(dead: weakref.ref[Tensor]) -> None:
            if (held := self._held.get(thread)) is not None and held.x is dead:
                self._held.pop(thread, None)

        # Autograd must own the only lasting reference, or the columns would outlive backward.
        version = -1 if x.is_inference() else x._version
        held = _Gathered(weakref.ref(x, forget), version, x_cols, {reader})
        self._held[thread] = held
        return held

    def _place(self, held: _Gathered, layer: SMTLayer) -> Place | None:
        """The first of those that launch together makes the places of all."""
        if not layer.may_share_launch():
            return None
        if id(layer) not in held.places:
            members = self._alive()
            others = [
                member
                for member in members
                if id(member) not in held.readers | held.places.keys()
                and member.may_share_launch()
                and member.blocks.dtype == layer.blocks.dtype
                and member.blocks.device == layer.blocks.device
            ]
            if not others or layer not in members:
                return None
            together = sorted([layer, *others[: ops.MAX_SIBLINGS - 1]], key=_name)
            launch = SharedLaunch(self._siblings_of(together))
            places = launch.places(held.x_cols, [member.blocks for member in together])
            held.places.update(zip(map(id, together), places, strict=True))
        return held.places.pop(id(layer))

    def _alive(self) -> list[SMTLayer]:
        """The members, in an order that does not change; without copies, as DataParallel makes."""
        if self._members is None:
            members = [m for m in _LIVE if m.__dict__.get("_input_group") is self]
            self._members = [weakref.ref(member) for member in sorted(members, key=_name)]
        return [m for ref in self._members if (m := ref()) is not None]

    def _siblings_of(self, layers: Sequence[SMTLayer]) -> Siblings:
        device = layers[0].block_rows.device
        key = device, *map(_name, layers)
        if key not in self._siblings:
            plans = [layer.layer_plan for layer in layers]
            tall = all(layer.takes_tall_tiles() for layer in layers)
            tiled = any(layer._block_tiles is not None for layer in layers)
            self._siblings[key] = Siblings(plans, self._slot_of, device, tall if tiled else None)
        return self._siblings[key]

    def to(self, device: torch.device) -> None:
        """Move the indices; called when a member module moves."""
        self._siblings = {}
        # The way to the meta device is one way for values; fully_shard's users go there and back.
        if device.type != "meta":
            self.col_blocks = self.col_blocks.to(device)

    def _gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.width == self.in_features and x.dtype == dtype and _is_all_of_its_memory(x):
            # As many bytes as a copy, and a pass less. No view of x, which it would keep.
            return x.detach().view(-1, self.in_features)
        # fully_shard moves parameters and buffers without telling the modules.
        if self.col_blocks.device != x.device:
            self.to(x.device)
        with torch.no_grad():
            x_TK = x.reshape(-1, x.shape[-1])
            col_blocks = self.col_blocks.to(x.device)
            return ops.gather_columns(x_TK, col_blocks, self.block_size, dtype, width=self.width)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "col_blocks": self.col_blocks,
            "block_size": self.block_size,
            "in_features": self.in_features,
            "width": self.width,
            "_slot_of": self._slot_of,
            "size": self.size,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._held, self._members, self._siblings = {}, None, {}


class CountedParameter(nn.Parameter):
    """Counts how often its ``.data`` was handed out, or replaced.

    Averages, Lookahead and SAM write into that, which advances no version counter. What replaces it may
    lie where something that replaced it before has lain.
    """

    handed_out = 0

    @property
    def data(self) -> Tensor:
        self.handed_out += 1
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.handed_out += 1
        _DATA.__set__(self, value)


class BlocksParameter(CountedParameter):
    """The blocks of a layer."""


_DATA: Any = torch._C.TensorBase.data
_FROZEN = (
    "SMT blocks with requires_grad=False in training: they do not train, and something below them does. "
    "PEFT freezes all but its own adapter (get_peft_model, peft_config=...). For an adapter on top of "
    "trained blocks call smt_ext.unpatch(model) first; else leave the adapter away."
)
_PLAIN = (nn.Parameter, Tensor, CountedParameter, BlocksParameter)

# Attributes that a copy does not take over.
_OF_THIS_OBJECT = ("_counters", "_sharded_blocks", "under_fsdp")


class _Counters:
    """The version counters of tensors, without their memory, also once the tensors are gone."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._twins = [tensor.detach() for tensor in tensors]
        for twin in self._twins:
            twin.data = twin.new_empty(0)

    def tensors(self) -> list[Tensor | None]:
        return [ref() for ref in self._tensors]

    def are_of(self, *tensors: Tensor) -> bool:
        return all(own is tensor for own, tensor in zip(self.tensors(), tensors, strict=True))

    def versions(self) -> tuple[int, ...]:
        return tuple(twin._version for twin in self._twins)


class SMTLayer(nn.Module):
    """A linear layer that trains selected blocks of its frozen weight (SMT paper, section 3).

    Not constructed: :func:`smt_ext.patch` turns an ``nn.Linear`` into an :class:`SMTLinear` and
    transformers' ``Conv1D`` into an :class:`SMTConv1D` in place, by class, so that the module
    object, its hooks and everybody's references to it stay.

    Attributes:
        weight: as it was, frozen; always contains the trained values after an optimizer step.
        bias: (N,) or None, as it was.
        blocks: the trainable parameter, (S, L, L), ordered by (row, column); zero where a ragged
            edge block is smaller than L x L. Float32 by default for half-precision weights.
        block_rows, block_cols: (S,) int32 buffers, position of each block in the block grid.
        layer_name: its name in the plan.
        layer_plan: this layer's part of the plan.
        original_blocks: (S, L, L) on the CPU, the values before training (on the meta device where
            the weight is).
        accumulate_in_place: backward adds block gradients into an existing ``blocks.grad``
            directly. Off by default, because tensor hooks on ``blocks`` do not see that (DDP does).
    """

    weight: Tensor
    bias: nn.Parameter  # or None, as in nn.Linear
    blocks: nn.Parameter
    block_rows: Tensor
    block_cols: Tensor
    _block_slots: Tensor
    _block_tiles: Tensor | None
    _lone_blocks: Tensor | None
    layer_name: str
    layer_plan: LayerPlan
    original_blocks: Tensor
    accumulate_in_place: bool
    _input_group: InputGroup
    _weight_state: WeightState
    # What blocks and weight were when the weight last got the blocks' values; None: nobody knows.
    _written: tuple[int, ...] | None
    # The version counters of blocks and weight, which live on when fully_shard replaces both.
    _counters: _Counters | None = None
    _held_rows: sharding.HeldRows | None = None
    _sharded_blocks: nn.Parameter | None = None
    under_fsdp = False  # blocks that are no shards are then gathered copies, which will be let go
    stored_transposed = False  # the layout says

    @classmethod
    def convert_(
        cls,
        name: str,
        matrix: Matrix,
        layer: LayerPlan,
        group: InputGroup,
        state: WeightState,
        block_dtype: torch.dtype,
    ) -> SMTLayer:
        """Turn a linear module into this class in place. Nothing is changed if this raises."""
        weight = weight_NK(matrix).detach()
        device = weight.device
        rows, cols = _index(layer, device)
        slots = group.slots(layer)
        with torch.no_grad():
            original = ops.gather_blocks(weight, rows, cols, layer.block_size)
            blocks = nn.Parameter(original.to(block_dtype, copy=True))
        linear = cls._take_on_(matrix)
        linear.weight.requires_grad_(False)
        linear.blocks = blocks
        linear.register_buffer("block_rows", rows, persistent=False)
        linear.register_buffer("block_cols", cols, persistent=False)
        linear.register_buffer("_block_slots", slots.to(device), persistent=False)
        linear.register_buffer("_block_tiles", None, persistent=False)
        linear.register_buffer("_lone_blocks", None, persistent=False)
        linear.layer_name = name
        linear.layer_plan = layer
        linear.original_blocks = original if original.is_meta else original.cpu()
        linear.accumulate_in_place = False
        group.to(device)
        linear._input_group = group
        if device.type == "cuda":
            linear.plan_tiles_()
        linear._weight_state = state
        linear.register_buffer("_checked", torch.empty(0, device=device), persistent=False)
        linear.note_written()
        _LIVE.add(linear)
        return linear

    def revert_(self, *, restore: bool) -> nn.Module:
        """Turn back into the module it was; with ``restore`` the base weight comes back too."""
        if sharding.is_sharded(self.blocks):
            raise PatchError(
                "the model is sharded (fully_shard), and its layers cannot be unpatched. Save with "
                "smt_ext.save_blocks(model, directory) or smt_ext.export(model, directory) on all "
                "ranks, and unpatch a model that is not sharded."
            )
        if restore:
            self.write_blocks_(self.original_blocks)
        else:
            self.write_changed_blocks_(by_value=True)
        weight: Any = self.weight
        if type(self.weight) is CountedParameter:
            weight.__class__ = nn.Parameter
            weight.__dict__.pop("handed_out", None)
        _LIVE.discard(self)
        return self._let_go_()

    @classmethod
    def _take_on_(cls, matrix: Matrix) -> SMTLayer:
        """The module that is to train the matrix."""
        assert isinstance(matrix, nn.Module)
        swap_class_(matrix, cls)
        assert isinstance(matrix, SMTLayer)
        return matrix

    def _let_go_(self) -> nn.Module:
        """Undo :meth:`convert_`, blocks and all."""
        del self.blocks, self.block_rows, self.block_cols, self._block_slots, self._checked
        del self._block_tiles, self._lone_blocks
        del self.layer_name, self.layer_plan, self.original_blocks, self.accumulate_in_place
        del self._input_group, self._weight_state, self._written
        for name in ("under_fsdp", "_counters", "_sharded_blocks", "_held_rows"):
            self.__dict__.pop(name, None)
        self._non_persistent_buffers_set -= {
            "block_rows", "block_cols", "_block_slots", "_checked", "_block_tiles", "_lone_blocks",
        }  # fmt: skip
        restore_class_(self)
        return self

    @property
    def weight_NK(self) -> Tensor:
        """The weight as (N, K), a view where it is stored otherwise; the layout brings it."""
        raise NotImplementedError

    def fused_weight(self) -> Tensor:
        """What an optimizer that updates blocks writes too: (N, K), or no element where none."""
        return self.weight_NK.detach()

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype of the weight's values."""
        return self.weight.dtype

    def check_holds_weight(self) -> None:
        """Raise PatchError where the weight is computed from other parameters at every use.

        That is what torch.nn.utils' parametrizations, prune and weight_norm leave.
        """
        # By name, not as sets: torch.compile of torch 2.10 cannot trace those.
        computed = "weight_orig" in self._parameters or "weight_v" in self._parameters
        if computed or "parametrizations" in self._modules:
            raise PatchError(
                f"{self.layer_name!r} was parametrized (parametrize, weight_norm, prune) after "
                "smt_ext.patch: its weight is computed from parameters that the blocks are no part of. "
                "Remove that (torch.nn.utils.parametrize.remove_parametrizations, prune.remove, "
                "remove_weight_norm), or do not patch this layer."
            )

    def check_revertible(self) -> None:
        """Raise PatchError where turning back would lose what was trained; never for a plain weight."""

    def plan_name(self, name: str) -> str:
        """The name in a plan of a layer whose module has this name."""
        return name

    @property
    def block_size(self) -> int:
        """L, the side of a block."""
        return self.layer_plan.block_size

    def check_trained(self) -> None:
        """Raise PatchError while :func:`smt_ext.original_weights` is active."""
        self._weight_state.check_trained()

    def blocks_changed(self) -> bool:
        """Whether blocks or weight were changed since the weight got the blocks' values.

        Known from the version counters, which every in-place operation advances, and from the
        address, which an assignment to ``.data`` changes; who asks for ``.data`` is taken to have
        written into it. Raw kernels and ``torch.distributed`` leave no trace, nor do later operations on
        a view of ``.data`` or on one rank's part.
        """
        if self._weight_state.holds_original or self.weight.is_meta:
            return False
        mark = self._mark()
        if mark is None:
            return self._is_inference()
        return mark != self._written

    def note_written(self) -> None:
        """The weight holds the blocks' values now."""
        for tensor, counted in ((self.blocks, BlocksParameter), (self.weight, CountedParameter)):
            if type(tensor) is nn.Parameter and not self.under_fsdp:
                tensor.__class__ = counted
        self._written = self._mark()
        pair = self.blocks, self.weight
        if self._written is None or not all(map(_is_plain, pair)):
            return
        if not (self._counters and self._counters.are_of(*pair)):
            self.__dict__["_counters"] = _Counters(*pair)

    def _mark(self) -> tuple[int, ...] | None:
        """Changes when blocks or weight do; None where neither can be known."""
        blocks, weight = self.blocks, self.weight
        if sharding.is_sharded(blocks) and blocks is not self._sharded_blocks:
            self._note_sharded(blocks)
        if self._sharded_blocks is not None:
            # The same on all ranks, which write together or not at all; their parts' versions are not.
            return (id(self._sharded_blocks), self._sharded_blocks._version)
        if not _is_plain(blocks) or self._is_inference():
            return None
        versions = [t._version + getattr(t, "handed_out", 0) for t in (blocks, weight)]
        address = weight.data_ptr() if _is_plain(weight) else 0
        return (id(blocks), versions[0], blocks.data_ptr(), id(weight), versions[1], address)

    def _is_inference(self) -> bool:
        """Whether tensors were made in inference mode, which have no versions."""
        return self.blocks.is_inference() or self.weight.is_inference()

    def _note_sharded(self, blocks: nn.Parameter) -> None:
        """``fully_shard`` has put its shards in place of the blocks, which is no change of them."""
        # For a forward it swaps in gathered copies; users and optimizers hold this one.
        self.__dict__["_sharded_blocks"] = blocks
        self.under_fsdp = True
        counters, self.__dict__["_counters"] = self._counters, None
        if counters is not None and self._written is not None and blocks._version == 0:
            _, blocks_version, _, _, weight_version, _ = self._written
            if counters.versions() == (blocks_version, weight_version):
                self._written = (id(blocks), 0)

    @torch.no_grad()
    def write_if_other_(self) -> bool:
        """Write the blocks, and tell autograd only if that changes the weight; whether it does."""
        before = self.read_held_blocks()
        self._write_(self.blocks.detach(), bump_version=False)
        after = self.read_held_blocks()
        other = not torch.equal(before.view(torch.uint8), after.view(torch.uint8))
        if other and not self.weight.is_inference():
            increment_version(self.weight)
        if not self.under_fsdp:
            self.note_written()
        return other

    def unseen_shards(self) -> bool:
        """Whether ``fully_shard`` has gathered the blocks before their shards were seen."""
        return self.under_fsdp and self._sharded_blocks is None

    def write_changed_blocks_(self, *, by_value: bool = False) -> None:
        """Write the blocks into the weight if either has changed since; see :meth:`blocks_changed`.

        ``by_value``: compare the numbers, as whoever hands weights out does: operations of
        ``torch.distributed`` and raw kernels leave no trace.

        In a compiled graph, which must not change a weight that another graph has kept for backward,
        an operator looks when the graph runs, and refuses. Sharded layers are looked after before the
        model gathers them, see :func:`write_changed_blocks_of`; what is gathered by then is written
        for as long as it lasts.
        """
        if torch.compiler.is_compiling():
            torch.ops.smt_ext.check_written_(self._checked, self.blocks)
        elif self.blocks_changed():
            if sharding.is_sharded(self.blocks):
                self.write_blocks_()
            else:
                self.write_if_other_()
        elif by_value and not (
            self._weight_state.holds_original
            or self.weight.is_meta
            or self.under_fsdp
            or sharding.is_sharded(self.blocks)
        ):
            self.write_if_other_()

    def write_before_saving_(self) -> None:
        """:meth:`write_changed_blocks_` for a state dict, which one rank may ask for alone.

        Raises:
            PatchError: the blocks have changed, and are sharded: ranks can only write them together.
        """
        if not sharding.is_sharded(self.blocks):
            self.write_changed_blocks_(by_value=True)
        elif self.blocks_changed():
            raise PatchError(
                f"the blocks of {self.layer_name!r} have changed outside optimizer.step(), and its "
                "sharded weight lacks their new values. Call smt_ext.sync_weights(model) on all ranks, "
                "then take the state dict."
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; what is assigned is the layer's own from now on."""
        super().register_parameter(name, param)
        if name in ("blocks", "weight"):
            self.take_for_own()

    def take_for_own(self) -> None:
        """Let the present tensors be the layer's own."""
        if self._own() is not None:
            pair = self.blocks, self.weight
            plain = all(tensor is not None and _is_plain(tensor) for tensor in pair)
            self.__dict__["_counters"] = _Counters(*pair) if plain else None

    def _own(self) -> _Counters | None:
        """Of the layer's own tensors; None where torch itself puts others in place for a forward."""
        swapped = self.under_fsdp or "_is_replica" in self.__dict__
        return None if swapped else self._counters

    def lent_weight(self) -> Tensor | None:
        """(N, K), where a caller has put tensors into the layer for one call; None elsewhere.

        As ``torch.func.functional_call`` does, past ``register_parameter``. Such tensors are read and
        not written: the weight as it comes, with the blocks in their places where blocks came too.
        Differentiable in both.
        """
        if (own := self._own()) is None:
            return None
        blocks, weight = own.tensors()
        if blocks is self.blocks:
            return None if weight is self.weight else self.weight_NK
        return self._overlaid()

    def check_not_lent(self) -> None:
        """Raise PatchError where forward has taken the weight for a caller's, and trained nothing."""
        own = self._own()
        if (
            own is not None
            and own.tensors()[0] is self.blocks
            and own.tensors()[1] is not self.weight
        ):
            raise PatchError(
                f"the weight of {self.layer_name!r} was replaced in module._parameters, where "
                "torch.func.functional_call puts what it lends for a call: its blocks have not trained. "
                "Replace it by assignment (module.weight = ...); keep it on one device, without offload."
            )

    def _overlaid(self) -> Tensor:
        """(N, K), a new tensor: the weight with the blocks in their places."""
        weight = self.weight_NK
        # Not from the buffers, which may be a caller's too.
        at = torch.tensor(self.layer_plan.blocks, device=weight.device)[:, :, None, None]
        inner = torch.arange(self.block_size, device=weight.device)
        rows = at[:, 0] * self.block_size + inner[:, None]
        cols = at[:, 1] * self.block_size + inner
        inside = ((rows < weight.shape[0]) & (cols < weight.shape[1])).nonzero(as_tuple=True)
        size = (len(at), self.block_size, self.block_size)
        values = within_range(self.blocks, weight.dtype).to(weight.dtype)
        return weight.index_put(
            (rows.expand(size)[inside], cols.expand(size)[inside]), values[inside]
        )

    def _multiply(self, x: Tensor, input: Tensor) -> Tensor:
        self.check_holds_weight()
        if (lent := self.lent_weight()) is not None:
            return linear(x, lent, self.bias)
        self.write_changed_blocks_()
        if not (torch.is_grad_enabled() and self.blocks.requires_grad):
            frozen = torch.is_grad_enabled() and self.training and x.requires_grad
            if frozen and not torch.compiler.is_compiling():
                warnings.warn(_FROZEN, stacklevel=3)  # which Python shows once
            return linear(x, self.weight_NK, self.bias)
        self.check_trained()
        x_cols, place = self._input_group.columns_and_place(input, autocast_dtype(input), self)
        return smt_linear(
            x,
            self.weight_NK,
            self.bias,
            self.blocks,
            x_cols,
            self.block_rows,
            self._block_slots,
            self.block_size,
            state=self._weight_state,
            accumulate_into=self.blocks if self.accumulate_in_place else None,
            tiles=self._block_tiles,
            lone=self._lone_blocks,
            place=place,
        )

    def may_share_launch(self) -> bool:
        """Whether the blocks' gradient may come from a launch shared with siblings.

        Its node leads to the blocks of all, and calls the hooks of a sibling that was not called, too:
        blocks with hooks keep to themselves. So do those that ``fully_shard`` swaps.
        """
        blocks = self.blocks
        hooked = blocks._backward_hooks or getattr(blocks, "_post_accumulate_grad_hooks", None)
        return (
            blocks.requires_grad
            and not self.accumulate_in_place
            and not self.under_fsdp
            and _is_plain(blocks)
            and not hooked
        )

    @torch.no_grad()
    def read_blocks(self, dtype: torch.dtype | None = None) -> Tensor:
        """Copy the selected blocks out of the weight, (S, L, L); of a sharded one a collective."""
        self.write_changed_blocks_(by_value=True)
        return self._read_written(dtype)

    def _read_written(self, dtype: torch.dtype | None = None) -> Tensor:
        if sharding.is_sharded(self.weight):
            return self._held().read_full(self.weight.detach(), dtype)
        return self.read_held_blocks(dtype)

    @torch.no_grad()
    def read_held_blocks(self, dtype: torch.dtype | None = None) -> Tensor:
        """(S, L, L), zero where the weight is sharded and another rank holds the rows."""
        if sharding.is_sharded(self.weight):
            return self._held().read(self.weight.detach(), dtype)
        return ops.gather_blocks(
            self.weight_NK, self.block_rows, self.block_cols, self.block_size, dtype
        )

    @torch.no_grad()
    def weight_before_training(self) -> Tensor:
        """A copy of the weight, as it is stored, with the original blocks; of a sharded one the part."""
        copy = sharding.local(self.weight.detach()).clone()
        blocks = self.original_blocks.to(copy.device, copy.dtype)
        if sharding.is_sharded(self.weight):
            self._held().write_(copy, blocks)
            return copy
        matrix = (
            copy.flatten(0, -2) if copy.dim() > 2 else copy.mT if self.stored_transposed else copy
        )
        ops.scatter_blocks_(matrix, blocks, self.block_rows, self.block_cols)
        return copy

    @torch.no_grad()
    def write_blocks_(self, blocks: Tensor | None = None, *, bump_version: bool = True) -> None:
        """Write blocks (S, L, L), the trained ones by default, into the weight in place.

        Where ``blocks`` is sharded this is a collective: all ranks must call.
        """
        if blocks is None:
            self._write_(self.blocks.detach(), bump_version)
            self.note_written()
        else:
            self._write_(blocks, bump_version)

    def _write_(self, blocks: Tensor, bump_version: bool) -> None:
        blocks = within_range(sharding.full(blocks).to(self.weight.device), self.weight.dtype)
        if sharding.is_sharded(self.weight):
            self._held().write_(self.weight.detach(), blocks, bump_version=bump_version)
            return
        ops.scatter_blocks_(
            self.weight_NK.detach(),
            blocks,
            self.block_rows,
            self.block_cols,
            bump_version=bump_version,
        )

    def check_shards(self) -> None:
        """Refuse shards that blocks cannot be written into or that would drift apart over ranks.

        Raises:
            PatchError: names the layer, what was expected, and the way out.
        """
        if not sharding.is_sharded(self.weight):
            return
        self._held()
        if not sharding.is_sharded(self.blocks):
            raise PatchError(
                f"the weight of {self.layer_name!r} is sharded (fully_shard), but its blocks, the "
                "parameter that trains, are not: nobody would sum their gradients over ranks. Leave "
                f"the blocks of {self.layer_name!r} out of ignored_params."
            )

    def _held(self) -> sharding.HeldRows:
        if self._held_rows is None:
            self._held_rows = sharding.HeldRows(
                self.layer_name, self.weight, self.layer_plan, self.stored_transposed
            )
        return self._held_rows

    def _read_blocks_from_weight_(self) -> None:
        """Let the blocks be what the weight holds, after it alone was loaded."""
        with torch.no_grad():
            blocks = self._read_written()  # whatever the blocks are, the weight's values count
            sharding.local(self.blocks).copy_(sharding.shard_of(blocks, self.blocks))
        self.note_written()

    def extra_repr(self) -> str:
        n, k = self.layer_plan.shape
        return (
            f"in_features={k}, out_features={n}, bias={self.bias is not None}, "
            f"{len(self.block_rows)} blocks of {self.block_size}x{self.block_size}"
        )

    def plan_tiles_(self) -> None:
        """Find which blocks the CUDA kernel takes together: slow, and no other kernel asks."""
        device = self.block_rows.device
        tiles, lone = self._input_group.tiles(self.layer_plan, tall=self.takes_tall_tiles())
        if tiles is not None and lone is not None:
            self._block_tiles, self._lone_blocks = tiles.to(device), lone.to(device)

    def takes_tall_tiles(self) -> bool:
        """Whether the CUDA kernel has tall tiles for the layer's products."""
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return tf32 or self.weight.dtype != torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> SMTLayer:
        dtype, written = self.weight.dtype, self._settle()
        before = self.block_rows.device
        self.__dict__.pop("_sharded_blocks", None)
        super()._apply(fn, recurse)
        device = self.block_rows.device
        self._input_group.to(device)
        lost = False
        if device.type != "meta":
            # to_empty() leaves whatever was in memory, and no state dict has these.
            own = self.block_rows, self.block_cols, self._block_slots
            slots = self._input_group.slots(self.layer_plan).to(device)
            index = (*_index(self.layer_plan, device), slots)
            if lost := not all(map(torch.equal, own, index)):
                self.block_rows, self.block_cols, self._block_slots = index
        if device.type == "cuda" and (lost or before.type != "cuda"):
            self.plan_tiles_()
        self._held_rows = None
        self._note_moved(dtype, written)
        return self

    def _settle(self) -> bool:
        """Whether the weight holds the blocks' values, after writing them where that takes one rank."""
        if sharding.is_sharded(self.blocks):
            return not self.blocks_changed()
        self.write_changed_blocks_(by_value=True)
        # Parameters may be replaced, and torch.utils.swap_tensors refuses those with weak references.
        self.__dict__["_counters"] = None
        return True

    def _note_moved(self, dtype: torch.dtype, written: bool) -> None:
        """After a conversion from ``dtype``, before which the weight was ``written``."""
        # The blocks may hold more digits (a float32 master) than the weight had before.
        exact = self.weight.dtype == dtype or self.weight.is_meta
        if written and exact:
            self.note_written()
        elif sharding.is_sharded(self.blocks):
            self._written = None  # for ranks to write when they next meet
        elif self._weight_state.holds_original:
            self.write_blocks_(self.original_blocks)
        else:
            self.write_blocks_()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.write_before_saving_()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if prefix + "blocks" in state_dict or prefix + "weight" in state_dict:
            self.check_trained()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "blocks" in state_dict:
            self.write_blocks_()
        elif prefix + "weight" in state_dict:
            self._read_blocks_from_weight_()

    def __getstate__(self) -> dict[str, Any]:
        self.check_trained()  # a copy could not leave original_weights
        self.write_before_saving_()
        return {k: v for k, v in self.__dict__.items() if k not in _OF_THIS_OBJECT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note_written()  # the copy's tensors count anew
        _LIVE.add(self)


class SMTLinear(LinearLayout, SMTLayer, nn.Linear):
    """A patched ``nn.Linear``; see :class:`SMTLayer`."""


class SMTConv1D(Conv1DLayout, SMTLayer):
    """A patched transformers ``Conv1D``, whose weight is stored as (K, N); see :class:`SMTLayer`."""
