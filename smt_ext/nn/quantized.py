"""The patched layer over a frozen weight that is stored in four or eight bits.

The stored weight is never written. Forward and backward each dequantise it to a temporary, put the
blocks in their places, and do the one ordinary matmul; nothing of size N x K outlives the call. The
blocks, the columns saved for their gradients, and the optimizer are those of :class:`SMTLayer`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..distributed import sharding
from ..errors import PatchError
from ..layouts import Matrix, plain_class, swap_class_
from ..quantization import PackedWeight, Scheme, packed_weight
from .functional import WeightState, accumulates_into, autocast_dtype, linear
from .modules import SMTLayer

__all__ = ["QuantizedLayout", "SMTQuantizedLinear", "with_layout"]

_combined: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class QuantizedLayout(nn.Module):
    """A packed weight, multiplied by the input in the dtypes that the quantised layer uses."""

    bias: nn.Parameter  # or None, as in nn.Linear

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is stored now."""
        packed = packed_weight(self)
        if packed is None:
            raise PatchError(
                f"a {plain_class(self).__name__} holds no quantised weight any more: it was replaced. "
                "Unpatch the model before changing weights."
            )
        return packed

    def forward(self, input: Tensor) -> Tensor:
        # A Linear4bit has a dtype that it computes in; the others compute, and return, what their
        # input and autocast say.
        layer = cast(Any, self)
        if not hasattr(layer, "set_compute_type"):
            return self._multiply_packed(input, self._bias_as(input), input)
        if not layer.compute_type_is_set:
            layer.set_compute_type(input)
            layer.compute_type_is_set = True
        x = input if layer.compute_dtype is None else input.to(layer.compute_dtype)
        return self._multiply_packed(x, self._bias_as(x), input).to(input.dtype)

    def _bias_as(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _multiply_packed(self, x: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        """``x @ weight.T + bias``; ``input`` is the tensor that the module was called with."""
        raise NotImplementedError


class SMTQuantizedLinear(QuantizedLayout, SMTLayer):
    """A patched ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes, or torchao's linear.

    By class swap: the module stays an instance of its own class too, for whoever asks. ``blocks``
    are float32 and the only copy of the trained values; outside them the layer computes bit for bit what
    the quantised layer computes where it dequantises. (On GPUs bitsandbytes' ``Linear8bitLt``
    rounds its input to eight bits as well; this layer does not.)
    """

    @property
    def weight_NK(self) -> Tensor:
        """The weight with the trained blocks, dequantised to float32: a new tensor."""
        return self.dequantized()

    def fused_weight(self) -> Tensor:
        """None: (0, 0)."""
        return self.blocks.detach().new_empty((0, 0))

    @property
    def value_dtype(self) -> torch.dtype:
        """What the weight was quantised from."""
        return self.packed.dtype

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) with the blocks that the layer computes with at the moment: a new tensor."""
        packed = self.packed
        with torch.no_grad():
            if self._weight_state.holds_original:
                return packed.dequantize(dtype)
            return packed.scheme.overlaid(
                packed.tensors, dtype, self.blocks.detach(), self.block_rows, self.block_cols
            )

    def _multiply_packed(self, x: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.blocks.requires_grad):
            return linear(x, self.dequantized(autocast_dtype(x)), bias)
        self.check_trained()
        packed = self.packed
        y: Tensor = _QuantizedLinearFunction.apply(
            x,
            bias,
            self.blocks,
            self._input_group.columns(input, autocast_dtype(x), id(self)),
            self.block_rows,
            self.block_cols,
            self._block_slots,
            self._block_tiles,
            self._lone_blocks,
            packed.scheme,
            self._weight_state,
            self.blocks if self.accumulate_in_place else None,
            *packed.tensors,
        )
        return y

    @torch.no_grad()
    def read_held_blocks(self, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the blocks, (S, L, L): nothing else holds them."""
        return self.blocks.detach().to(dtype or self.blocks.dtype, copy=True)

    def read_blocks(self, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the blocks, (S, L, L)."""
        return self.read_held_blocks(dtype)

    def write_blocks_(self, blocks: Tensor | None = None, *, bump_version: bool = True) -> None:
        """Nothing to write: forward takes the blocks from where they are."""

    def may_share_launch(self) -> bool:
        """Never: the blocks are an input of every product, too."""
        return False

    def blocks_changed(self) -> bool:
        """Never: there is no second copy that could be old."""
        return False

    def write_changed_blocks_(self, *, by_value: bool = False) -> None:
        """Nothing to write; see :meth:`write_blocks_`."""

    def check_shards(self) -> None:
        """Refuse a model under ``fully_shard``."""
        if sharding.is_sharded(self.blocks):
            raise PatchError(
                f"{self.layer_name!r} is quantised, and the model is sharded (fully_shard), which "
                "quantised bases do not support. Use DistributedDataParallel, or a base in bfloat16."
            )

    def check_revertible(self) -> None:
        """Raise PatchError where unpatching would lose what was trained."""
        if not torch.equal(self.blocks.detach().cpu(), self.original_blocks):
            raise PatchError(
                f"the weight of {self.layer_name!r} is stored in "
                f"{self.packed.scheme.title} and cannot take the trained blocks. Save them "
                "(smt_ext.save_blocks, smt_ext.export) and call smt_ext.unpatch(model, restore=True)."
            )

    def _read_blocks_from_weight_(self) -> None:
        with torch.no_grad():
            self.blocks.copy_(
                ops.gather_blocks(
                    self.packed.dequantize(), self.block_rows, self.block_cols, self.block_size
                )
            )

    @classmethod
    def _take_on_(cls, matrix: Matrix) -> SMTLayer:
        assert isinstance(matrix, nn.Module)
        swap_class_(matrix, with_layout(cls, type(matrix)))
        assert isinstance(matrix, SMTQuantizedLinear)
        return matrix

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (SMTQuantizedLinear, plain_class(self)), self.__dict__


class _QuantizedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        x_cols_TU: Tensor,
        rows: Tensor,
        cols: Tensor,
        slots: Tensor,
        tiles: Tensor | None,
        lone: Tensor | None,
        scheme: Scheme,
        state: WeightState,
        accumulate_into: Tensor | None,
        *packed: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(blocks, x_cols_TU, rows, cols, slots, tiles, lone, *packed)
        ctx.scheme = scheme
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.state = state
        ctx.accumulate_into = accumulate_into
        return linear(x, scheme.overlaid(packed, autocast_dtype(x), blocks, rows, cols), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.check_trained()
        blocks, x_cols_TU, rows, cols, slots, tiles, lone, *packed = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        dx = dbias = dblocks = None
        if ctx.needs_input_grad[0]:
            weight = ctx.scheme.overlaid(tuple(packed), dy.dtype, blocks, rows, cols)
            dx = (dy_TN @ weight).view(ctx.x_shape).to(ctx.x_dtype)
            del weight
        if ctx.needs_input_grad[1]:
            dbias = dy_TN.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[2]:
            into = ctx.accumulate_into
            arguments = dy_TN, x_cols_TU, rows, slots, blocks.shape[1]
            if into is not None and into.grad is not None and accumulates_into(into):
                ops.block_grad_acc_(into.grad, *arguments, tiles=tiles, lone=lone)
            else:
                dblocks = ops.block_grad(*arguments, blocks.dtype, tiles=tiles, lone=lone)
        return dx, dbias, dblocks, *(None,) * (9 + len(packed))


def with_layout(task: type[QuantizedLayout], plain: type[nn.Module]) -> type[nn.Module]:
    """The class with the task in front of a module's own class, which goes on saving its state."""
    if (task, plain) not in _combined:
        members = {"__module__": __name__}
        _combined[task, plain] = type(f"{task.__name__}Of{plain.__name__}", (task, plain), members)
    return _combined[task, plain]


def _rebuild(task: type[QuantizedLayout], plain: type[nn.Module]) -> nn.Module:
    """An empty module of the combined class, for copy and pickle."""
    cls = with_layout(task, plain)
    return cls.__new__(cls)
