"""One launch for the block gradients of linears that read the same input: q, k and v, gate and up.

Each by itself leaves a GPU half idle at the end of its launch. Autograd hands a linear's gradients on
as soon as its output's gradient has come, so the launch is a node of its own, which all of them lead to:

    blocks of q, k, v -> node -> handles of q, k, v -> linears

Forward makes the node when the first of them is called. It gives each a handle, a tensor of the shape
of its output that has no memory. In backward the gradient of the handle is that of the output; once the
node has those of all linears that were called, it computes the gradients of all their blocks. The node
keeps nothing between forward and backward: the columns, which each linear has saved, come from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..plan import LayerPlan
from .tiles import tiles_of

__all__ = ["Place", "SharedLaunch", "Siblings"]


class Siblings:
    """What :func:`smt_ext.ops.block_grad_siblings` is told of the layers, on one device.

    Attributes:
        widths: N of each. counts: blocks of each.
        block_size: L.
        rows, slots: (S,) int32 for the blocks of all, in the order of the layers.
        tiles, lone: how they are computed together, or None.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        slot_of: Mapping[int, int],
        device: torch.device,
        tall: bool | None,
    ) -> None:
        """``slot_of`` column blocks among those gathered; ``tall`` as of tiles_of, None for no tiles."""
        self._layers = layers
        self._of = partial(Siblings, slot_of=slot_of, device=device, tall=tall)
        self._some: dict[tuple[bool, ...], Siblings] = {}
        self.widths = [layer.shape[0] for layer in layers]
        self.counts = [len(layer.blocks) for layer in layers]
        (self.block_size,) = {layer.block_size for layer in layers}
        heights = (-(-width // self.block_size) for width in self.widths)
        first_rows = list(accumulate(heights, initial=0))[:-1]
        rows = [
            first + row
            for layer, first in zip(layers, first_rows, strict=True)
            for row, _ in layer.blocks
        ]
        slots = [slot_of[col] for layer in layers for _, col in layer.blocks]
        self.rows, self.slots = (
            torch.tensor(index, dtype=torch.int32).to(device) for index in (rows, slots)
        )
        self.tiles: Tensor | None = None
        self.lone: Tensor | None = None
        if tall is not None:
            tiles, lone = tiles_of(rows, slots, self.block_size, tall=tall, first_rows=first_rows)
            if tiles is not None and lone is not None:
                self.tiles, self.lone = tiles.to(device), lone.to(device)

    def only(self, which: tuple[bool, ...]) -> Siblings:
        """Some of the layers, in their order."""
        if all(which):
            return self
        if which not in self._some:
            pairs = zip(self._layers, which, strict=True)
            self._some[which] = self._of([layer for layer, wanted in pairs if wanted])
        return self._some[which]


class SharedLaunch:
    """One forward of siblings, and the launch of its backward.

    What a linear needs of it outlives the forward, so it refers to no tensor of the graph.
    """

    def __init__(self, siblings: Siblings) -> None:
        self.siblings = siblings
        # From the first linear that is done with them until the launch, by the backward that runs.
        self._x_cols_TU: dict[int, Tensor] = {}

    def places(self, x_cols_TU: Tensor, blocks: Sequence[Tensor]) -> list[Place]:
        """For the layers that ``blocks`` (S, L, L) belong to."""
        handles = _BlockGradients.apply(self, x_cols_TU, *blocks)
        return [Place(self, handle) for handle in handles]

    def hand_on(self, dy_TN: Tensor, x_cols_TU: Tensor) -> Tensor:
        """Called in backward by each linear: the gradient of its handle."""
        edges = torch._C._current_autograd_node().next_functions
        (node,) = [edge for edge, _ in edges if edge and getattr(edge, "launch", None) is self]
        if torch._C._will_engine_execute_node(node):  # else nobody would let go of the columns
            self._x_cols_TU[torch._C._current_graph_task_id()] = x_cols_TU
        return dy_TN

    def take_columns(self) -> Tensor:
        """What :meth:`hand_on` was given."""
        return self._x_cols_TU.pop(torch._C._current_graph_task_id())


@dataclass(frozen=True)
class Place:
    """A linear's place in a launch.

    Attributes:
        handle: (T, N), of the dtype of the linear's output; its gradient is that of the output.
    """

    launch: SharedLaunch
    handle: Tensor


class _BlockGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launch: SharedLaunch, x_cols_TU: Tensor, *blocks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a sibling that was not called has none
        ctx.launch = launch
        ctx.blocks_dtype = blocks[0].dtype
        return tuple(
            x_cols_TU.new_empty_strided((len(x_cols_TU), width), (0, 0))
            for width in launch.siblings.widths
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_TN: Tensor | None) -> tuple[Tensor | None, ...]:
        launch: SharedLaunch = ctx.launch
        called = tuple(dy is not None for dy in dys_TN)
        siblings = launch.siblings.only(called)
        grads = ops.block_grad_siblings(
            [dy for dy in dys_TN if dy is not None],
            launch.take_columns(),
            siblings.rows,
            siblings.slots,
            siblings.block_size,
            ctx.blocks_dtype,
            tiles=siblings.tiles,
            lone=siblings.lone,
        ).split(siblings.counts)
        found = iter(grads)
        return None, None, *(next(found) if own else None for own in called)
