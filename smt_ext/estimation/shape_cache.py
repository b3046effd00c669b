"""Operators on the meta device, computed once for each combination of shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ShapeCache"]

_META = torch.device("meta")

# Shape, strides, dtype of a result; None where an operator has several and leaves one out.
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


class ShapeCache(TorchDispatchMode):
    """Remembers what operators make of given shapes, and makes it without running them again.

    The layers of a model are alike, and torch works out many shapes in Python: a model of thirty
    layers is run at the price of one. What comes out is what would have come out, storage by storage:
    only results in memory of their own are remembered; views, changes in place and results that are
    no plain meta tensors always run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._functional: dict[Any, bool] = {}
        self._made: dict[Any, tuple[_Made, ...] | None] = {}
        self.hits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        functional = self._functional.get(func)
        if functional is None:
            returns = func._schema.returns
            functional = not func._schema.is_mutable and all(r.alias_info is None for r in returns)
            self._functional[func] = functional
        key = _key((func, args, *kwargs.items())) if functional else None
        if key is None:
            return func(*args, **kwargs)
        made = self._made.get(key)
        if made is not None:
            self.hits += 1
            out = [m and torch.empty_strided(m[0], m[1], dtype=m[2], device=_META) for m in made]
            return out[0] if len(func._schema.returns) == 1 else tuple(out)
        out = func(*args, **kwargs)
        if key not in self._made:
            self._made[key] = _description(out, args, kwargs)
        return out


def _key(value: Any) -> Any:
    """What the shapes of a result depend on; None for arguments that are not only shapes."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.device != _META:
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        keys = [_key(part) for part in value]
        return None if None in keys else tuple(keys)
    return type(value), value  # 1, 1.0 and True are equal, and do not make the same dtype


def _description(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of results in fresh memory that holds them exactly; None for others."""
    tensors = out if isinstance(out, tuple) else (out,)
    known = {
        leaf.untyped_storage()._cdata
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor)
    }
    made: list[_Made] = []
    for tensor in tensors:
        if tensor is None:
            made.append(None)
            continue
        if type(tensor) is not Tensor or tensor.device != _META:
            return None
        storage = tensor.untyped_storage()
        like = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META
        ).untyped_storage()
        if storage._cdata in known or storage.nbytes() != like.nbytes():
            return None
        known.add(storage._cdata)
        made.append((tensor.shape, tensor.stride(), tensor.dtype))
    return tuple(made)
