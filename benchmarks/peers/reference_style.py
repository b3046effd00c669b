"""Sparse matrix tuning in the manner of the authors' published code, as a peer to measure against.

Written for this benchmark from its description: the blocks are separate parameters that each forward
copies into the weight one by one; backward keeps a view of the input for each block, hence the whole
input, and multiplies block by block in Python; a dense optimizer runs over the block parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt_ext import BlockPlan


class _ReferenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        blocks: Tensor,
        places: list[tuple[int, int]],
        size: int,
    ) -> Tensor:
        # Their code puts the views on ctx; saved like this they hold as much, and can be counted.
        views = [x[..., col * size : (col + 1) * size] for _, col in places]
        ctx.places, ctx.size = places, size
        ctx.save_for_backward(weight, *views)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *views = ctx.saved_tensors
        size = ctx.size
        grads = []
        for (row, _), view in zip(ctx.places, views, strict=True):
            part = dy[..., row * size : (row + 1) * size].flatten(0, -2)
            grads.append(part.T @ view.flatten(0, -2))
        return dy @ weight, None, torch.stack(grads), None, None


class ReferenceLinear(nn.Module):
    def __init__(self, linear: nn.Linear, places: tuple[tuple[int, int], ...], size: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.places, self.size = list(places), size
        self.blocks = nn.Parameter(torch.stack([self._part(r, c).clone() for r, c in places]))

    def _part(self, row: int, col: int) -> Tensor:
        size = self.size
        return self.weight.data[row * size : (row + 1) * size, col * size : (col + 1) * size]

    def forward(self, x: Tensor) -> Tensor:
        for block, (row, col) in zip(self.blocks.data, self.places, strict=True):
            self._part(row, col).copy_(block)
        out: Tensor = _ReferenceFunction.apply(x, self.weight, self.blocks, self.places, self.size)
        return out


def patch_reference_style(model: nn.Module, plan: BlockPlan) -> None:
    """Freeze the model and train the plan's blocks; whole blocks only, no biases."""
    model.requires_grad_(False)
    for name, layer in plan.layers.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(
            model.get_submodule(parent),
            last,
            ReferenceLinear(linear, layer.blocks, layer.block_size),
        )
