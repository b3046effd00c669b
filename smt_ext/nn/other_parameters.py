"""Parameters that train beside the blocks, such as norms, embeddings or a head.

To a patched model belongs whatever requires gradients in it. What is no block of it is saved, loaded and
exported with the blocks; to bring it back to what it was before training takes the value of then, which
:func:`smt_ext.train_also` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..distributed import sharding
from ..errors import PatchError

__all__ = ["OtherParameters"]


class OtherParameters:
    """What is known of a model's other parameters as they were before training.

    Attributes:
        kept: owner, name there, value on the CPU: fully_shard replaces parameters, not their owners.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[tuple[nn.Module, str, Tensor]] = []
        self._versions = WeakIdKeyDictionary(
            {p: p._version for p in model.parameters() if not p.is_inference()}
        )

    def keep(self, owner: nn.Module, name: str) -> None:
        """Keep the present value of a parameter, which is to train."""
        value = owner.get_parameter(name).detach()
        device = "meta" if value.is_meta else "cpu"
        self.kept.append((owner, name, sharding.full(value).to(device, copy=True)))

    def originals(self) -> dict[int, Tensor]:
        """id of a parameter -> its value before training."""
        return {id(owner.get_parameter(name)): value for owner, name, value in self.kept}

    def changed(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of those that are, or may be, other than before training; a collective if sharded."""
        originals, names = self.originals(), []
        for name, parameter in parameters.items():
            if (before := originals.get(id(parameter))) is not None:
                now = sharding.full(parameter.detach()).cpu()
                if not torch.equal(now, before.to(now.dtype)):
                    names.append(name)
            elif parameter.is_inference() or self._versions.get(parameter) != parameter._version:
                names.append(name)
        return names

    def check_known(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise PatchError where one has changed whose value before training nobody has kept."""
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
        for owner, name, value in self.kept:
            parameter = owner.get_parameter(name)
            sharding.local(parameter.detach()).copy_(sharding.shard_of(value, parameter))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Inside, the parameters are as before training; autograd does not see it."""
        trained = []
        try:
            for owner, name, value in self.kept:
                parameter = owner.get_parameter(name)
                part = sharding.local(parameter.data)
                trained.append(part.clone())
                part.copy_(sharding.shard_of(value, parameter))
            yield
        finally:
            for (owner, name, _), value in zip(self.kept, trained, strict=False):
                sharding.local(owner.get_parameter(name).data).copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]
        # A copy's parameters count anew: what is not kept is unknown there.
        self._versions = WeakIdKeyDictionary()
