"""What changes in training beside the blocks: other parameters (norms, embeddings, a head) and buffers.

To a patched model belongs whatever requires gradients in it, and whatever its forward writes into
persistent buffers (running statistics, averages). What is no block of it is saved, loaded and exported
with the blocks; to bring it back to what it was before training takes the value of then, which
:func:`smt_ext.train_also` keeps of parameters, and :func:`smt_ext.patch` of buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..errors import PatchError
from .checksum import Checksum, checksum
from .modules import BlocksParameter

__all__ = ["OtherParameters", "persistent_buffers"]


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and name there of the buffers that a state dict holds, each once."""
    found: set[int] = set()
    for prefix, owner in model.named_modules():
        for name, buffer in owner._buffers.items():
            temporary = name in owner._non_persistent_buffers_set
            if buffer is not None and not temporary and id(buffer) not in found:
                found.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, owner, name


class OtherParameters:
    """What is known of a model's other parameters and buffers as they were before training.

    Attributes:
        kept: owner, name there, value on the CPU: fully_shard replaces parameters, not their owners.
        buffers: the same of the persistent buffers.
        sums: owner, name there, checksum of each parameter when the model was patched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[tuple[nn.Module, str, Tensor]] = []
        self.buffers = [
            (owner, name, _on_cpu(getattr(owner, name)))
            for _, owner, name in persistent_buffers(model)
        ]
        self.sums: list[tuple[nn.Module, str, Checksum | None]] = []
        found: set[int] = set()
        for owner in model.modules():
            for name, p in owner._parameters.items():
                if p is not None and id(p) not in found and not isinstance(p, BlocksParameter):
                    found.add(id(p))
                    self.sums.append((owner, name, checksum(p)))

    def keep(self, owner: nn.Module, name: str) -> None:
        """Keep the present value of a parameter, which is to train."""
        self.kept.append((owner, name, _on_cpu(owner.get_parameter(name))))

    def checksums(self) -> dict[int, Checksum | None]:
        """id of a parameter -> its checksum when the model was patched, None if unknown."""
        return {id(owner._parameters.get(name)): value for owner, name, value in self.sums}

    def originals(self) -> dict[int, Tensor]:
        """id of a parameter or buffer -> its value before training."""
        return {id(tensor): value for _, _, tensor, value in self._present()}

    def _present(self) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
        """Owner, name, tensor of now, value before training."""
        for owner, name, value in self.kept:
            yield owner, name, owner.get_parameter(name), value
        for owner, name, value in self.buffers:
            if (buffer := owner._buffers.get(name)) is not None:
                yield owner, name, buffer, value

    def changed(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of those that are, or may be, other than before training; a collective if sharded."""
        originals, checksums = self.originals(), self.checksums()
        return [
            name
            for name, p in parameters.items()
            if (
                not _equal(p, originals[id(p)])
                if id(p) in originals
                else sharding.is_sharded(p) or checksum(p) != checksums.get(id(p))
            )
        ]

    def changed_buffers(self, root: nn.Module) -> dict[str, Tensor]:
        """Persistent buffers that are other than before training, or have come since, by name."""
        originals, found = self.originals(), {}
        for name, owner, key in persistent_buffers(root):
            buffer: Tensor = getattr(owner, key)
            before = originals.get(id(buffer))
            if before is None or not _equal(buffer, before):
                found[name] = buffer
        return found

    def check_known(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise PatchError where one has changed whose value before training is not to be had."""
        for owner, name, tensor, value in self._present():
            if tensor.shape != value.shape:
                raise PatchError(
                    f"{name!r} of the {type(owner).__name__} has shape {tuple(tensor.shape)}, and had "
                    f"{tuple(value.shape)} before training. Load the base model again."
                )
        kept = self.originals()
        unknown = {name: p for name, p in parameters.items() if id(p) not in kept}
        if names := self.changed(unknown):
            raise PatchError(
                f"{names[0]!r} trains beside the blocks, and its value before training is unknown. Let "
                "it train with smt_ext.train_also(model, [name]) instead of requires_grad_(True) or "
                "freeze=False; or load the base model again."
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values of before training."""
        for _, _, tensor, value in self._present():
            sharding.local(tensor.detach()).copy_(sharding.shard_of(value, tensor))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Inside, parameters and buffers are as before training; autograd does not see it."""
        trained = []
        try:
            for owner, name, tensor, value in self._present():
                part = sharding.local(tensor.data)
                trained.append((owner, name, tensor, part.clone()))
                part.copy_(sharding.shard_of(value, tensor))
            yield
        finally:
            for owner, name, tensor, value in trained:
                if isinstance(tensor, nn.Parameter):
                    tensor = owner.get_parameter(name)
                else:
                    owner._buffers[name] = tensor  # forward may have put another in its place
                sharding.local(tensor.data).copy_(value)


def _on_cpu(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return sharding.full(value).to("meta" if value.is_meta else "cpu", copy=True)


def _equal(tensor: Tensor, before: Tensor) -> bool:
    now = sharding.full(tensor.detach()).cpu()
    return torch.equal(now, before.to(now.dtype))
