"""Operators on the meta device, computed once for each combination of shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..memory import AllocationLog

__all__ = ["CachedLog", "ShapeCache"]

_META = torch.device("meta")


class ShapeCache:
    """Remembers what operators make of given shapes, and makes it without running them again.

    The layers of a model are alike, and torch works out many shapes in Python: a model of thirty
    layers is run at the price of one. Only results in memory of their own are remembered; views,
    changes in place and results that are no plain meta tensors always run.
    """

    def __init__(self) -> None:
        self._makes_new: dict[Any, bool] = {}
        # Call -> shape, strides and dtype of each result, or None where it always runs.
        self._made: dict[Any, list[Any] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``."""
        if func not in self._makes_new:
            schema = func._schema
            self._makes_new[func] = not schema.is_mutable and all(
                r.alias_info is None for r in schema.returns
            )
        key = _key((func, args, *kwargs.items())) if self._makes_new[func] else None
        if key is None:
            return func(*args, **kwargs)
        if (made := self._made.get(key)) is not None:
            out = [m and torch.empty_strided(m[0], m[1], dtype=m[2], device=_META) for m in made]
            return out[0] if len(func._schema.returns) == 1 else tuple(out)
        out = func(*args, **kwargs)
        if key not in self._made:
            self._made[key] = _description(out, (args, kwargs))
        return out


class CachedLog(AllocationLog):
    """A log of what operators allocate, each run once for each combination of shapes."""

    def __init__(self, shapes: ShapeCache, known: Iterable[Tensor] = ()) -> None:
        super().__init__(known)
        self._shapes = shapes

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._shapes.run(func, args, kwargs)


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


def _description(out: Any, inputs: Any) -> list[Any] | None:
    """Of results in fresh memory that holds them exactly; None for others."""
    known = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    made: list[Any] = []
    for tensor in out if isinstance(out, tuple) else (out,):
        if tensor is not None:
            if type(tensor) is not Tensor or tensor.device != _META:
                return None
            storage = tensor.untyped_storage()
            shape = tensor.shape, tensor.stride(), tensor.dtype
            like = torch.empty_strided(*shape[:2], dtype=shape[2], device=_META).untyped_storage()
            if storage._cdata in known or storage.nbytes() != like.nbytes():
                return None
            known.add(storage._cdata)
        made.append(None if tensor is None else shape)
    return made
