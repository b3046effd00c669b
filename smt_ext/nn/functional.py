"""The differentiable linear layer of Sparse Matrix Tuning (SMT paper, section 3.2).

Forward is one ordinary matmul. What it keeps for backward is an owned copy of the input columns
that the selected blocks read, instead of the whole input; backward computes dX as usual and only
the selected blocks of dW.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import PatchError

if TYPE_CHECKING:
    from .siblings import Place

__all__ = ["WeightState", "accumulates_into", "autocast_dtype", "linear", "smt_linear"]

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class WeightState:
    """What the weights of a patched model hold at the moment, shared by all of its SMT layers.

    ``holds_original`` is True inside :func:`smt_ext.original_weights`. That context swaps weights
    without telling autograd (the values are put back bit for bit, so graphs built outside stay
    valid), hence forward with gradients and backward must be refused while it is active.
    """

    def __init__(self) -> None:
        self.holds_original = False

    def check_trained(self) -> None:
        """Raise PatchError where gradients would be taken at the swapped-in original weights."""
        if self.holds_original:
            raise PatchError(
                "smt_ext.original_weights(model) is active: the weights hold the base model, so "
                "gradients would be wrong, and saved would be the base. Run the reference forward under "
                "torch.no_grad(); call backward(), save, load and copy after the context has ended."
            )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear computes in for the input ``x``, autocast taken into account."""
    device = x.device.type
    if x.is_meta:  # has no autocast, and torch raises if asked
        return x.dtype
    if torch.is_autocast_enabled(device) and x.dtype in _AUTOCAST_DTYPES:
        return torch.get_autocast_dtype(device)
    return x.dtype


def accumulates_into(leaf: Tensor) -> bool:
    """Whether the backward that runs adds into ``leaf.grad``; ``torch.autograd.grad`` does not."""
    edges = torch._C._current_autograd_node().next_functions
    own = [edge for edge, _ in edges if edge and getattr(edge, "variable", None) is leaf]
    try:
        return any(torch._C._will_engine_execute_node(edge) for edge in own)
    except RuntimeError:  # torch refuses the question where it hands out the leaf's gradient
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear for a frozen weight.

    For an input of three or more dimensions that is no plain stretch of memory, torch's matmul with
    a frozen weight becomes a batched product over copies of the weight, one for each batch entry.
    """
    if x.ndim > 2 and not x.is_contiguous():
        x = x.contiguous()
    return F.linear(x, weight, bias)


class _SMTLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        x_cols_TU: Tensor,
        rows: Tensor,
        slots: Tensor,
        block_size: int,
        state: WeightState,
        accumulate_into: Tensor | None,
        tiles: Tensor | None,
        lone: Tensor | None,
        place: Place | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, x_cols_TU, rows, slots, tiles, lone)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.blocks_dtype = blocks.dtype
        ctx.block_size = block_size
        ctx.state = state
        ctx.accumulate_into = accumulate_into
        ctx.launch = None if place is None else place.launch
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.check_trained()
        weight, x_cols_TU, rows, slots, tiles, lone = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        dx = dbias = dblocks = None
        if ctx.needs_input_grad[0]:
            # Under autocast the weight is cast here once more: keeping forward's cast copy of a
            # frozen weight alive would cost more memory than the activations that SMT saves.
            dx = (dy_TN @ weight.to(dy.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy_TN.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            into = ctx.accumulate_into
            arguments = dy_TN, x_cols_TU, rows, slots, ctx.block_size
            if ctx.launch is not None:
                # As the gradient of the handle, which came in place of the blocks.
                dblocks = ctx.launch.hand_on(dy_TN, x_cols_TU)
            elif into is not None and into.grad is not None and accumulates_into(into):
                ops.block_grad_acc_(into.grad, *arguments, tiles=tiles, lone=lone)
            else:
                dblocks = ops.block_grad(*arguments, ctx.blocks_dtype, tiles=tiles, lone=lone)
        return dx, None, dbias, dblocks, *[None] * 9


def smt_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    x_cols_TU: Tensor,
    rows: Tensor,
    slots: Tensor,
    block_size: int,
    *,
    state: WeightState | None = None,
    accumulate_into: Tensor | None = None,
    tiles: Tensor | None = None,
    lone: Tensor | None = None,
    place: Place | None = None,
) -> Tensor:
    """``y = x @ weight.T + bias``, differentiable in x, bias and the selected blocks of weight.

    Args:
        x: input, (..., K).
        weight: (N, K), frozen; it must hold the values of ``blocks`` already.
        bias: (N,) or None.
        blocks: (S, L, L), the trainable blocks; only their gradient is used here.
        x_cols_TU: the input columns that the blocks read, (T, U), as made by
            :func:`smt_ext.ops.gather_columns` in the dtype that the matmul computes in.
        rows: (S,) int32, block row of each block in the weight.
        slots: (S,) int32, position of each block's columns within ``x_cols_TU``, in blocks.
        block_size: L.
        state: refuses backward while the weight holds other values than in forward.
        accumulate_into: the parameter whose ``.grad``, where it exists already, backward adds the
            block gradients into, instead of handing a new tensor to autograd (no second buffer
            and no extra pass in gradient accumulation; autograd hooks of the blocks do not run).
        tiles, lone: how the blocks are computed together, see :func:`smt_ext.ops.block_grad`.
        place: in a launch that computes the blocks' gradient, and those of siblings.

    Returns:
        (..., N).
    """
    state = WeightState() if state is None else state
    out: Tensor = _SMTLinearFunction.apply(
        x, weight, bias, blocks if place is None else place.handle, x_cols_TU, rows, slots,
        block_size, state, accumulate_into, tiles, lone, place,
    )  # fmt: skip
    return out
