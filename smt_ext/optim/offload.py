"""AdamW for blocks on a GPU with its state on the CPU: gradients come down, blocks go back up.

    GPU   blocks, gradients, weights
    CPU   moments and master values, which never travel; two page-locked buffers a layer,
          one for the gradient and one for the blocks

Three things run at the same time for different layers: gradients travel down on one stream, the CPU
kernel updates, updated blocks travel up on another stream and are scattered into the weight there.
The stream of the caller waits for the last of them, so whatever it launches next sees the new
weights. Bytes over the bus a step: one gradient and one copy of the blocks, plus the blocks down
where no master value is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..nn.modules import SMTLayer
from ..plan import LayerPlan

__all__ = ["HostBlocks", "Offload"]

# Layers are updated together until they fill this many bytes of gradient: enough work for all
# cores, and few enough that transfers of the next ones overlap with it.
_CHUNK_BYTES = 8 << 20


class HostBlocks:
    """One layer's gradient and blocks in CPU memory, page-locked if the layer is on a GPU.

    Attributes:
        grad, blocks: (S, L, L), of the blocks' dtype.
        weight: (S*L, L), the blocks one below the other. The kernel writes a weight beside the
            blocks; the real one is on the GPU, so it gets this, in which block s lies at
            (rows[s], cols[s]) = (s, 0).
    """

    def __init__(self, param: nn.Parameter, layer: LayerPlan) -> None:
        self.layer = layer
        count, size, _ = param.shape
        self.grad = _host_empty(param)
        self.blocks = _host_empty(param)
        self.weight = torch.empty(count * size, size, dtype=param.dtype)
        self.rows = torch.arange(count, dtype=torch.int32)
        self.cols = torch.zeros(count, dtype=torch.int32)
        inside = [(i, *layer.extent(block)) for i, block in enumerate(layer.blocks)]
        self._ragged = [(i, h, w) for i, h, w in inside if (h, w) != (size, size)]

    def clear_padding(self) -> None:
        """Zero the gradient where a ragged block has no weight.

        The kernel leaves such entries alone by the shape of the weight, which this one does not
        have. Backward writes zeros there, but others may add to gradients.
        """
        for i, height, width in self._ragged:
            self.grad[i, height:] = 0
            self.grad[i, :, width:] = 0

    def fits(self, param: nn.Parameter, layer: LayerPlan) -> bool:
        """Whether the buffers are still those of this layer."""
        like = self.grad.dtype == param.dtype and self.grad.is_pinned() == param.is_cuda
        return like and self.layer == layer


class Offload:
    """Buffers and streams of one optimizer."""

    def __init__(self) -> None:
        self._buffers: dict[int, HostBlocks] = {}
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    @torch.no_grad()
    def update(
        self,
        params: Sequence[nn.Parameter],
        modules: Sequence[SMTLayer],
        kernel: Callable[[Sequence[int], Sequence[HostBlocks]], None],
        *,
        reads_blocks: bool,
        one_call: bool,
    ) -> None:
        """Run ``kernel`` on host copies of the layers and bring the blocks and weights up to date.

        Args:
            params: blocks with gradients, all on one device.
            modules: the layers that own them.
            kernel: updates the blocks of the layers with the given places in ``params``, from
                their host buffers.
            reads_blocks: the kernel starts from the blocks, and not from master values that it has
                already.
            one_call: the kernel must see all layers at once.
        """
        device = params[0].device
        host = [self._buffer(p, m.layer_plan) for p, m in zip(params, modules, strict=True)]
        down, up = self._pair_of_streams(device)
        with down:
            arrived = []
            for param, buffers in zip(params, host, strict=True):
                assert param.grad is not None
                buffers.grad.copy_(param.grad, non_blocking=True)
                if reads_blocks:
                    buffers.blocks.copy_(param, non_blocking=True)
                arrived.append(_record(device))
        for chunk in [list(range(len(params)))] if one_call else _chunks(params):
            if (event := arrived[chunk[-1]]) is not None:
                event.synchronize()
            for i in chunk:
                host[i].clear_padding()
            kernel(chunk, [host[i] for i in chunk])
            with up:
                for i in chunk:
                    params[i].copy_(host[i].blocks, non_blocking=True)
                    modules[i].write_blocks_()
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._streams[device][1])

    def _buffer(self, param: nn.Parameter, layer: LayerPlan) -> HostBlocks:
        buffers = self._buffers.get(id(param))
        if buffers is None or not buffers.fits(param, layer):
            buffers = self._buffers[id(param)] = HostBlocks(param, layer)
        return buffers

    def _pair_of_streams(
        self, device: torch.device
    ) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """The streams for the way down and up, each behind what the caller has launched so far."""
        if device.type != "cuda":
            return nullcontext(), nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        down, up = self._streams[device]
        # Backward has to end before its gradients leave, and whatever reads the weights before
        # they change.
        down.wait_stream(current)
        up.wait_stream(current)
        return torch.cuda.stream(down), torch.cuda.stream(up)


def _host_empty(param: nn.Parameter) -> Tensor:
    return torch.empty(param.shape, dtype=param.dtype, device="cpu", pin_memory=param.is_cuda)


def _record(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _chunks(params: Sequence[nn.Parameter]) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    size = 0
    for i, param in enumerate(params):
        if size >= _CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += param.numel() * param.element_size()
    return chunks
