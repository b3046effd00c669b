"""The state of a training run, for an exact resume."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import __version__
from .._files import replace_directory, sha256_of_file, write_text
from ..distributed import ranks, sharding
from ..errors import CheckpointError, PatchError
from ..nn.modules import SMTLayer
from ..nn.patching import (
    changed_buffers,
    check_trained,
    other_parameters,
    patched_root,
    plan_of,
    restore_beside,
)
from .artifact import (
    about_base,
    any_sharded,
    check_base,
    modules_by_plan,
    read_info,
    sealed,
    set_beside,
    set_blocks,
    stored_beside,
    write_together,
)

__all__ = ["load_training_state", "random_state", "save_training_state", "set_random_state"]

STATE_FORMAT, STATE_VERSION = "smt_ext.training_state", 2
_STATE_FILE, _STATE_INFO = "training_state.safetensors", "training_state.json"


def save_training_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    distributed: bool = True,
    **extra: Any,
) -> None:
    """Save all that an exact resume needs: blocks, whatever trains or changes beside them, optimizer,
    scheduler, random states, extra.

    Tensors go into a safetensors file and the rest into JSON, no pickle. The directory is replaced as
    a whole: after a kill at any moment it holds the old state or the new one.

    Where ``torch.distributed`` is initialised all ranks must call, under DistributedDataParallel as
    under ``fully_shard``, and rank 0 writes: the random states of all ranks, and blocks and moments
    as a whole, so that the state can be loaded at any number of ranks.

    Args:
        distributed: False lets one rank save alone, with its own random state; not for a sharded
            model.
        extra: JSON values of the caller, such as ``step=100``; rank 0's are kept.

    Raises:
        PatchError: the model is not patched, is sharded and ``distributed`` is False, or holds a frozen
            parameter that has changed since it was patched.
        CheckpointError: the disk is full or not writable, or a value is neither tensor nor JSON;
            on every rank.
    """
    check_trained(model)
    sharding.reshard(model)
    plan = plan_of(model)
    modules = modules_by_plan(model, plan)
    sharded = any_sharded(modules)
    if sharded and not distributed:
        raise PatchError(
            "the model is sharded (fully_shard), so no rank can save alone: leave distributed=False "
            "away, and call save_training_state on all ranks."
        )
    about = about_base(model, modules)
    drawn = random_state()
    by_rank = ranks.gather_objects(drawn) if distributed else [drawn]
    if distributed:
        _check_that_ranks_agree(optimizer)
    with write_together(together=len(by_rank) > 1) as writes:
        if not (writes or sharded):
            return
        state = {
            "blocks": {name: m.blocks.detach() for name, m in modules.items()},
            "parameters": {name: p.detach() for name, p in other_parameters(model).items()},
            "buffers": changed_buffers(model),
            "optimizer": optimizer.state_dict(),
            "optimizer_class": _class_of(optimizer),
            "parameter_names": _names_of(optimizer, model, modules),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "random": drawn,
            "extra": extra,
        }
        if len(by_rank) > 1:
            state["random_of_ranks"] = by_rank
        tensors: dict[str, Tensor] = {}
        skeleton = _flatten(state, "state", tensors)
        if not writes:
            return
        with replace_directory(directory, "a training state") as temporary:
            save_file(tensors, temporary / _STATE_FILE, metadata={"format": "pt"})
            info = {
                "format": STATE_FORMAT,
                "version": STATE_VERSION,
                "smt_ext": __version__,
                "torch": torch.__version__,
                "sha256": sha256_of_file(temporary / _STATE_FILE),
                **about,
                "plan": json.loads(plan.to_json()),
                "state": skeleton,
            }
            write_text(temporary / _STATE_INFO, json.dumps(sealed(info)) + "\n")


def load_training_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Restore what :func:`save_training_state` wrote; training then goes on bit for bit.

    A state loads at any number of ranks, one included, whether the model is sharded or not. At
    another number than it was saved on, sums over ranks round differently, and random numbers are
    others, with a warning: a rank whose random state was saved takes it up, any other keeps the one
    that it has. All ranks must call.

    Args:
        model: patched with the same plan, on the same base model.

    Returns:
        the ``extra`` values.

    Raises:
        CheckpointError: missing or damaged, saved for another plan or of another optimizer, or the
            base model is another one; names the first module that differs.
    """
    check_trained(model)
    info = read_info(
        directory, _STATE_INFO, _STATE_FILE, STATE_FORMAT, STATE_VERSION, whole=True, older=None
    )
    sharding.reshard(model)
    plan = plan_of(model)
    if info["plan"].fingerprint != plan.fingerprint:
        raise CheckpointError(
            f"the training state in {os.fspath(directory)!r} was saved with another plan than the "
            "model is patched with. Patch with that plan (training_state.json holds it) to resume."
        )
    state = _usable_state(directory, info.get("state"), info["tensors"])
    modules = modules_by_plan(model, plan)
    others = state.get("parameters", {})  # version 1 has none
    check_base(directory, model, modules, {**info, "parameters": list(others)}, strict=True)
    # Older files do not say.
    if (saved := state.get("optimizer_class", _class_of(optimizer))) != _class_of(optimizer):
        raise CheckpointError(
            f"the training state in {os.fspath(directory)!r} is of the optimizer {saved}, expected "
            f"{_class_of(optimizer)}. Make that optimizer to resume; to go on with another one, take "
            "the blocks alone, from smt_ext.save_blocks and load_blocks."
        )
    for name, module in modules.items():
        saved_blocks = state["blocks"].get(name)
        if not isinstance(saved_blocks, Tensor) or saved_blocks.shape != module.blocks.shape:
            raise CheckpointError(f"{os.fspath(directory)!r} holds no usable blocks of {name!r}")
    if differing := sorted(others.keys() ^ other_parameters(model).keys()):
        raise CheckpointError(
            f"{differing[0]!r} trains beside the blocks in only one of this model and the state in "
            f"{os.fspath(directory)!r}. Let the same parameters require gradients as when it was saved."
        )
    beside = {**others, **state.get("buffers", {})}
    stored_beside(directory, model, {"parameters": list(beside)}, beside)
    # Moments are kept in the optimizer's order. Older files do not say which that was.
    now = _names_of(optimizer, model, modules)
    if (then := state.get("parameter_names", now)) != now:
        pairs = zip(chain(*then), chain(*now), strict=False)
        one = next((pair for pair in pairs if pair[0] != pair[1]), None)
        what = f"{one[1]!r} where it held {one[0]!r}" if one else "other parameters or groups"
        raise CheckpointError(
            f"the optimizer holds {what} when the training state in {os.fspath(directory)!r} was saved, "
            "so moments would go to other layers. Build it from the same parameters in the same order."
        )
    optimizer.load_state_dict(_sharded_state(state["optimizer"], optimizer))
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    elif scheduler is not None or state["scheduler"] is not None:
        lacking = "the state" if scheduler is not None else "this call"
        warnings.warn(
            f"{lacking} has no scheduler, so the schedule of {os.fspath(directory)!r} does not go on",
            stacklevel=2,
        )
    restore_beside(model)  # buffers that had not changed
    set_beside(model, beside)
    with torch.no_grad():
        for name, module in modules.items():
            set_blocks(module, state["blocks"][name])
    # A file of one process, or of one rank alone, has no list.
    _restore_random_state(directory, state.get("random_of_ranks", [state["random"]]))
    return dict(state["extra"])


def _check_that_ranks_agree(optimizer: Optimizer) -> None:
    """Raise on all ranks if they have skipped different steps: their replicas are no longer one."""
    skipped = ranks.gather_objects(getattr(optimizer, "skipped_steps", None))
    if len(set(skipped)) > 1:
        raise CheckpointError(
            f"ranks have skipped different numbers of steps ({skipped}): an inf or NaN appeared on some "
            "after gradients were reduced, and their weights have gone apart. Go back to the last state."
        )


def _usable_state(
    directory: str | os.PathLike[str], skeleton: Any, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state that a file describes, which may be sealed and none all the same."""
    try:
        state = _unflatten(skeleton, tensors)
        random.Random().setstate(state["random"]["python"])
        for key in ("blocks", "optimizer", "extra"):
            dict(state[key])
        state["scheduler"], state["random"]["numpy"][4], state["random"]["torch"].shape
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{os.fspath(directory)!r} holds no usable training state: {error!r}"
        ) from None
    return dict(state)


def _names_of(
    optimizer: Optimizer, model: nn.Module, modules: Mapping[str, SMTLayer]
) -> list[list[str]]:
    """Of the parameters of each group."""
    names = {id(p): name for name, p in patched_root(model).named_parameters()}
    names |= {id(m.blocks): f"{name}.blocks" for name, m in modules.items()}
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _class_of(optimizer: Optimizer) -> str:
    """Name of its class; of what accelerate wraps, where it is wrapped."""
    return type(getattr(optimizer, "optimizer", optimizer)).__qualname__


def _sharded_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Optimizer state in which what is as large as its parameter is cut over ranks as that is.

    torch's optimizers do not mix whole moments with sharded parameters.
    """
    numbers = (i for group in state["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    # Another number of parameters is for the optimizer to refuse.
    by_number = dict(zip(numbers, params, strict=False))

    def cut(value: Any, param: Tensor | None) -> Any:
        if param is None or not sharding.is_sharded(param):
            return value
        if not isinstance(value, Tensor) or value.shape != param.shape:
            return value
        return sharding.like(sharding.shard_of(value, param).to(param.device), param)

    entries = {
        number: {key: cut(value, by_number.get(number)) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with the tensors taken out; dictionaries as pairs, since their keys need not be text."""
    if isinstance(value, Tensor):
        whole = sharding.full(value.detach())
        if type(whole) is not Tensor:
            raise CheckpointError(
                f"cannot save {path!r}: a {type(whole).__name__} is no plain tensor of numbers. Save "
                "optimizer.state_dict() with torch.save instead, and the blocks with "
                "smt_ext.save_blocks."
            )
        while path in tensors:  # "a/b" and "a" -> "b"
            path += "'"
        tensors[path] = whole.cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        for key in value:
            if key is not None and not isinstance(key, (bool, int, float, str)):
                raise CheckpointError(
                    f"cannot save {path!r}: it has the key {key!r} of type {type(key).__name__}, "
                    "expected text and numbers"
                )
        return {"map": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(
        f"cannot save {path!r} of type {type(value).__name__}: expected tensors, numbers, text, "
        "lists and dictionaries"
    )


def _unflatten(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _unflatten(child, tensors) for key, child in content}
    if kind in ("list", "tuple"):
        items = [_unflatten(child, tensors) for child in content]
        return tuple(items) if kind == "tuple" else items
    return content


def random_state() -> dict[str, Any]:
    """Where the generators of Python, numpy and torch (all devices in use) stand."""
    state_of_numpy: tuple[Any, ...] = tuple(np.random.get_state(legacy=True))
    name, keys, position, has_gauss, gauss = state_of_numpy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(
    directory: str | os.PathLike[str], by_rank: Sequence[Mapping[str, Any]]
) -> None:
    """Give this rank the state that it was saved with, if it was."""
    rank, world = ranks.rank(), ranks.world_size()
    if rank < len(by_rank):
        set_random_state(by_rank[rank])
    if ranks.is_main() and len(by_rank) != world:
        without = f" The random states of ranks {len(by_rank)} to {world - 1} stay as they are."
        warnings.warn(
            f"{os.fspath(directory)!r} was saved with the random states of {len(by_rank)} ranks, and "
            f"{world} resume: random numbers, such as dropout's, differ from the run that never stopped."
            f"{without if len(by_rank) < world else ''}",
            stacklevel=3,
        )


def set_random_state(state: Mapping[str, Any]) -> None:
    """Let them go on from there."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # There may be fewer devices than where it was saved.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
