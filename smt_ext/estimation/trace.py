"""One training step run for its shapes: what is in memory at every moment of it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import DataError, first_line
from ..layouts import is_conv1d
from ..memory import AllocationLog, SavedBytes, held_tensors

__all__ = ["ShapeLog", "Trace", "layer_kinds", "no_collection", "trace_step"]

_META = torch.device("meta")
# Call -> shape, strides and dtype of each result, or None where it must run.
_made: dict[Any, tuple[Any, ...] | None] = {}


@dataclass(frozen=True)
class Trace:
    """A forward and backward pass on the meta device.

    Attributes:
        saved: kind of layer -> bytes that its layers keep for backward, at the end of forward.
        gradients: bytes of all gradients at the end of backward.
        levels: bytes that the step has made and not yet let go, after each event.
        events: the order in which storages appear and go; the same for two batch sizes if the
            model does the same operations for both.
        at_peak: ``gradients``, ``saved`` and ``working`` -> bytes at the highest level.
    """

    saved: Mapping[str, int]
    gradients: int
    levels: np.ndarray
    events: tuple[int, ...]
    at_peak: Mapping[str, int]


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave cycles of earlier steps alone in the middle of this one; and it is faster."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_collection()
def trace_step(model: nn.Module, batch: int, length: int) -> Trace:
    """Forward and backward of a causal language model on the meta device.

    Args:
        model: on the meta device, in training mode; the parameters that train require gradients.
        batch, length: of the token ids, all of which are labels too.

    Raises:
        DataError: the model cannot run without values (it branches on them).
    """
    kinds = layer_kinds(model)
    log = ShapeLog(held_tensors(model))
    try:
        with log, torch.enable_grad():
            ids = torch.zeros((batch, length), dtype=torch.int64, device="meta")
            with SavedBytes(model, by_module=True) as saved:
                loss = model(input_ids=ids, labels=ids).loss
            kept = {index for key, index in log.live().items() if key in saved.storages}
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            gradients = {index for grad in grads if (index := log.index_of(grad)) is not None}
    except Exception as error:  # a model's own code raises what it likes
        raise DataError(
            f"{type(model).__name__} cannot be run from shapes alone, without values or a mask: "
            f"{first_line(error)}"
        ) from error
    del grads
    model.zero_grad(set_to_none=True)
    by_kind: Counter[str] = Counter()
    for name, size in saved.by_module.items():
        by_kind[kinds[name]] += size
    levels = np.cumsum([log.sizes[e - 1] if e > 0 else -log.sizes[-e - 1] for e in log.events])
    until_peak = log.events[: int(levels.argmax()) + 1]
    alive = {e - 1 for e in until_peak if e > 0} - {-e - 1 for e in until_peak if e < 0}
    parts = {
        "gradients": alive & gradients,
        "saved": alive & kept - gradients,
        "working": alive - kept - gradients,
    }
    at_peak = {part: sum(log.sizes[index] for index in found) for part, found in parts.items()}
    gradient_bytes = sum(log.sizes[index] for index in gradients)
    return Trace(dict(by_kind), gradient_bytes, levels, tuple(log.events), at_peak)


class ShapeLog(AllocationLog):
    """A log of what operators allocate on the meta device, each worked out once for given shapes.

    The layers of a model are alike, and torch works out many shapes in Python: a model of thirty
    layers is run at the price of one. Only results in memory of their own are remembered; views,
    changes in place and results that are no plain meta tensors always run.
    """

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _remembered(func, args, kwargs)


def _remembered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key = _key((func, args, *kwargs.items())) if _makes_new(func) else None
    if key is None:
        return func(*args, **kwargs)
    if (made := _made.get(key)) is not None:
        out = [m and torch.empty_strided(m[0], m[1], dtype=m[2], device=_META) for m in made]
        return out[0] if len(func._schema.returns) == 1 else tuple(out)
    result = func(*args, **kwargs)
    if key not in _made:
        _made[key] = _description(result, (args, kwargs))
    return result


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operator's schema says that it neither changes nor returns what it is given."""
    schema = func._schema
    return not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


def _key(value: Any) -> Any:
    """What the shapes of a result depend on; None for arguments that are not only shapes."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.device != _META:
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        keys = [_key(part) for part in value]
        return None if None in keys else tuple(keys)
    return type(value), value  # 1, 1.0 and True are equal, and do not make the same dtype


def _description(out: Any, inputs: Any) -> tuple[Any, ...] | None:
    """Of results in fresh memory that holds them exactly; None for others."""
    taken = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    made: list[Any] = []
    for tensor in out if isinstance(out, tuple) else (out,):
        if tensor is None:
            made.append(None)
            continue
        if type(tensor) is not Tensor or tensor.device != _META:
            return None
        storage, like = tensor.untyped_storage(), torch.empty_like(tensor).untyped_storage()
        if storage._cdata in taken or storage.nbytes() != like.nbytes():
            return None
        taken.add(storage._cdata)
        made.append((tensor.shape, tensor.stride(), tensor.dtype))
    return tuple(made)


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Module name -> the kind of layer that memory is accounted under."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return {
        name: "logits and loss" if module in (model, base) else _kind(name, module)
        for name, module in model.named_modules()
    }


def _kind(name: str, module: nn.Module) -> str:
    cls = type(module)
    if "lora_" in name or cls.__module__.startswith("peft."):
        return "adapters"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear inputs"
    words = cls.__name__.lower()
    if "attention" in words:
        return "attention"
    if "norm" in words:
        return "norms"
    if "mlp" in words or "activation" in words or cls.__module__ == "torch.nn.modules.activation":
        return "activation functions"
    return "other"
