"""Save and load trained blocks, and the state of a training run for an exact resume."""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .._files import recover_directory, replace_directory, sha256_of_file, write_text
from ..distributed import ranks, sharding
from ..errors import CheckpointError, PatchError
from ..nn.modules import SMTLayer
from ..nn.patching import patch, plan_of, smt_modules, unpatch
from ..plan import BlockPlan
from . import block_sets

__all__ = [
    "BLOCKS_FILE",
    "BLOCKS_INFO",
    "blocks_content",
    "load_blocks",
    "load_plan",
    "load_training_state",
    "one_writer",
    "read_blocks_info",
    "save_blocks",
    "save_training_state",
    "write_blocks_content",
]

BLOCKS_FORMAT, BLOCKS_VERSION = "smt_ext.blocks", 1
STATE_FORMAT, STATE_VERSION = "smt_ext.training_state", 1
BLOCKS_FILE, BLOCKS_INFO = "blocks.safetensors", "smt_blocks.json"
_STATE_FILE, _STATE_INFO = "training_state.safetensors", "training_state.json"


def save_blocks(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    readme: str | None = None,
) -> None:
    """Save the trained blocks: a few megabytes that turn the base model into the trained one.

    Writes ``blocks.safetensors`` (one tensor (S, L, L) a module) and ``smt_blocks.json`` (the plan,
    checksums, and a fingerprint of the base model's blocks). The directory appears whole or not
    at all; what was there before stays until then.

    Args:
        model: a patched model. Under ``fully_shard`` all ranks must call, and rank 0 writes.
        directory: made if need be, replaced if it exists.
        name: save this block set, which was loaded onto or merged on the model, instead.
        metadata: JSON values to keep with it.
        readme: text of a ``README.md`` beside the blocks, such as a model card.

    Raises:
        PatchError: the model is not patched, or has no such block set.
        CheckpointError: the disk is full or not writable.
    """
    content = blocks_content(model) if name is None else _content_of_set(model, name)
    with one_writer(model) as writes:
        if writes:
            with replace_directory(directory) as temporary:
                write_blocks_content(temporary, content, metadata)
                if readme is not None:
                    write_text(temporary / "README.md", readme)


def blocks_content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_blocks_content` writes; a collective if the model is sharded."""
    sharding.reshard(model)
    plan = plan_of(model)
    modules = _modules_by_plan(model, plan)
    blocks = {
        f"{name}.blocks": sharding.full(m.blocks.detach()).cpu().contiguous()
        for name, m in modules.items()
    }
    return blocks, {"base": _base_fingerprints(modules), "plan": json.loads(plan.to_json())}


def _content_of_set(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a block set that is loaded onto the model."""
    chosen = block_sets.block_set(model, name)
    layers = chosen.plan.layers
    base = {k: _fingerprint(layers[k].shape, v) for k, v in chosen.originals.items()}
    blocks = {f"{k}.blocks": value.cpu().contiguous() for k, value in chosen.blocks.items()}
    return blocks, {"base": base, "plan": json.loads(chosen.plan.to_json())}


def write_blocks_content(
    directory: Path,
    content: tuple[dict[str, Tensor], dict[str, Any]],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of :func:`save_blocks` into a directory that holds other files too."""
    blocks, about = content
    save_file(blocks, directory / BLOCKS_FILE, metadata={"format": "pt"})
    info = {
        "format": BLOCKS_FORMAT,
        "version": BLOCKS_VERSION,
        "smt_ext": _package_version(),
        "torch": torch.__version__,
        "sha256": sha256_of_file(directory / BLOCKS_FILE),
        **about,
        "metadata": dict(metadata or {}),
    }
    write_text(directory / BLOCKS_INFO, json.dumps(_sealed(info), indent=1) + "\n")


def read_blocks_info(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of ``smt_blocks.json``, with ``plan`` as a BlockPlan.

    ``base_dtype`` is the dtype that the base model had in training.

    Raises:
        CheckpointError: missing, damaged, of an unknown version, or its tensors do not match.
    """
    info = _read_info(directory, BLOCKS_INFO, BLOCKS_FILE, BLOCKS_FORMAT, BLOCKS_VERSION)
    dtypes = {base["dtype"] for base in info["base"].values()}
    # Layers of several dtypes: the widest holds all of them.
    info["base_dtype"] = max((getattr(torch, d) for d in dtypes), key=lambda d: d.itemsize)
    return info


def load_plan(path: str | os.PathLike[str]) -> BlockPlan:
    """Read a plan from a file, or from a folder that :func:`save_blocks` wrote.

    Raises:
        PlanError: no such file, or not a usable plan; names the file.
        CheckpointError: a folder that holds no saved blocks, or damaged ones.
    """
    if Path(path).is_dir():
        plan: BlockPlan = read_blocks_info(path)["plan"]
        return plan
    return BlockPlan.load(path)


def load_blocks(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    strict_base: bool = True,
) -> nn.Module:
    """Load blocks that :func:`save_blocks` wrote onto the base model they were trained from.

    A model that is not patched is patched with the stored plan. Everything is checked before a
    weight changes.

    With a ``name`` the model stays as it is, and the blocks are kept beside it: several sets can be
    loaded onto one base model, and :func:`smt_ext.activate` switches between them. That costs
    S x L x L values twice on the CPU for each set: the blocks, and the base model's own.

    Args:
        model: the base model, or one patched with the same plan; with a ``name``, not patched.
        directory: from :func:`save_blocks`.
        name: keep the blocks as a set of this name, not yet active.
        strict_base: also require the base model's own values in the blocks to be those of training.
            False loads the blocks onto any model of the same shapes.

    Returns:
        ``model``.

    Raises:
        CheckpointError: a damaged artefact, or another base model; names the first module that
            differs. The model is left as it was.
        PatchError: the model is patched with another plan, or, with a ``name``, patched at all; the
            name is taken.
    """
    info = read_blocks_info(directory)
    plan: BlockPlan = info["plan"]
    tensors = _load_tensors(Path(directory) / BLOCKS_FILE)
    if name is not None:
        _load_block_set(model, directory, name, info, tensors, strict_base)
        return model
    sharding.reshard(model)
    was_patched = bool(smt_modules(model))
    if was_patched and plan_of(model).fingerprint != plan.fingerprint:
        raise PatchError(
            f"model is patched with another plan than {os.fspath(directory)!r} holds. Call "
            "smt_ext.unpatch(model, restore=True) first; loading patches with the right plan. To resume "
            "a trainer, load these blocks onto a fresh base before it is built."
        )
    patch(model, plan)
    try:
        modules = _modules_by_plan(model, plan)
        _check_blocks(directory, modules, info, tensors, strict_base)
    except BaseException:
        if not was_patched:
            unpatch(model)
        raise
    with torch.no_grad():
        for layer, module in modules.items():
            _set_blocks(module, tensors[f"{layer}.blocks"])
    return model


def _load_block_set(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str,
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    strict_base: bool,
) -> None:
    if smt_modules(model):
        raise PatchError(
            f"cannot load {os.fspath(directory)!r} as block set {name!r}: the model is patched, and "
            "its weights belong to training. Call smt_ext.unpatch(model, restore=True) first."
        )
    block_sets.check_free(model, name)
    plan: BlockPlan = info["plan"]
    with block_sets.base_weights(model):
        # Patching checks all that there is to check, and reads the base's own blocks.
        patch(model, plan)
        try:
            modules = _modules_by_plan(model, plan)
            _check_blocks(directory, modules, info, tensors, strict_base)
            originals = {layer: module.original_blocks for layer, module in modules.items()}
        finally:
            unpatch(model)
    blocks = {layer: tensors[f"{layer}.blocks"] for layer in originals}
    block_sets.add_block_set(model, name, block_sets.BlockSet(plan, blocks, originals))


def _check_blocks(
    directory: str | os.PathLike[str],
    modules: Mapping[str, SMTLayer],
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    strict_base: bool,
) -> None:
    for name, module in modules.items():
        _check_base(directory, name, module, info["base"].get(name), strict_base)
        stored = tensors.get(f"{name}.blocks")
        if stored is None or stored.shape != module.blocks.shape:
            found = "none" if stored is None else tuple(stored.shape)
            raise CheckpointError(
                f"{os.fspath(directory)!r}: blocks of {name!r} have shape {found}, expected "
                f"{tuple(module.blocks.shape)}. The artefact is damaged; save it again."
            )


def save_training_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    distributed: bool = True,
    **extra: Any,
) -> None:
    """Save all that an exact resume needs: blocks, optimizer, scheduler, random states, extra.

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
        PatchError: the model is not patched, or is sharded and ``distributed`` is False.
        CheckpointError: the disk is full or not writable, or a value is neither tensor nor JSON;
            on every rank.
    """
    sharding.reshard(model)
    plan = plan_of(model)
    modules = _modules_by_plan(model, plan)
    sharded = _is_sharded(modules)
    if sharded and not distributed:
        raise PatchError(
            "the model is sharded (fully_shard), so no rank can save alone: leave distributed=False "
            "away, and call save_training_state on all ranks."
        )
    random_state = _random_state()
    by_rank = ranks.gather_objects(random_state) if distributed else [random_state]
    with _one_writer(together=len(by_rank) > 1) as writes:
        if not (writes or sharded):
            return
        state = {
            "blocks": {name: m.blocks.detach() for name, m in modules.items()},
            "optimizer": optimizer.state_dict(),
            "optimizer_class": _class_of(optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "random": random_state,
            "extra": extra,
        }
        if len(by_rank) > 1:
            state["random_of_ranks"] = by_rank
        tensors: dict[str, Tensor] = {}
        skeleton = _flatten(state, "state", tensors)
        if not writes:
            return
        with replace_directory(directory) as temporary:
            save_file(tensors, temporary / _STATE_FILE, metadata={"format": "pt"})
            info = {
                "format": STATE_FORMAT,
                "version": STATE_VERSION,
                "smt_ext": _package_version(),
                "torch": torch.__version__,
                "sha256": sha256_of_file(temporary / _STATE_FILE),
                "base": _base_fingerprints(modules),
                "plan": json.loads(plan.to_json()),
                "state": skeleton,
            }
            write_text(temporary / _STATE_INFO, json.dumps(_sealed(info)) + "\n")


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
    info = _read_info(directory, _STATE_INFO, _STATE_FILE, STATE_FORMAT, STATE_VERSION)
    sharding.reshard(model)
    plan = plan_of(model)
    if info["plan"].fingerprint != plan.fingerprint:
        raise CheckpointError(
            f"the training state in {os.fspath(directory)!r} was saved with another plan than the "
            "model is patched with. Patch with that plan (training_state.json holds it) to resume."
        )
    tensors = _load_tensors(Path(directory) / _STATE_FILE)
    state = _unflatten(info["state"], tensors)
    modules = _modules_by_plan(model, plan)
    for name, module in modules.items():
        _check_base(directory, name, module, info["base"].get(name), strict=True)
    # Older files do not say.
    if (saved := state.get("optimizer_class", _class_of(optimizer))) != _class_of(optimizer):
        raise CheckpointError(
            f"the training state in {os.fspath(directory)!r} is of the optimizer {saved}, expected "
            f"{_class_of(optimizer)}. Make that optimizer to resume; to go on with another one, take "
            "the blocks alone, from smt_ext.save_blocks and load_blocks."
        )
    optimizer.load_state_dict(_sharded_state(state["optimizer"], optimizer))
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, module in modules.items():
            _set_blocks(module, state["blocks"][name])
    # A file of one process, or of one rank alone, has no list.
    _restore_random_state(directory, state.get("random_of_ranks", [state["random"]]))
    return dict(state["extra"])


def _class_of(optimizer: Optimizer) -> str:
    """Name of its class; of what accelerate wraps, where it is wrapped."""
    return type(getattr(optimizer, "optimizer", optimizer)).__qualname__


def one_writer(model: nn.Module) -> AbstractContextManager[bool]:
    """Whether this rank writes: of a sharded model rank 0 does, and the others wait for it."""
    return _one_writer(_is_sharded(smt_modules(model)))


@contextmanager
def _one_writer(together: bool) -> Iterator[bool]:
    """Whether this rank writes; ``together`` with others rank 0 does, and its error is everybody's."""
    if not together:
        yield True
        return
    error: Exception | None = None
    try:
        yield ranks.is_main()
    except Exception as raised:
        error = raised
    ranks.raise_together(error, CheckpointError)


def _is_sharded(modules: Mapping[str, SMTLayer]) -> bool:
    return any(sharding.is_sharded(module.blocks) for module in modules.values())


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


def _set_blocks(module: SMTLayer, blocks: Tensor) -> None:
    """Take over blocks (S, L, L), whole on every rank."""
    sharding.local(module.blocks).copy_(sharding.shard_of(blocks, module.blocks))
    module.write_blocks_()


def _modules_by_plan(model: nn.Module, plan: BlockPlan) -> dict[str, SMTLayer]:
    """The patched layers under the plan's names, also where wrappers have put others in between."""
    found = list(smt_modules(model).values())
    by_name = {module.layer_name: module for module in found}
    names = {name for name, layer in plan.layers.items() if layer.blocks}
    if by_name.keys() != names or len(found) != len(names):
        missing = next(iter(sorted(names - by_name.keys())), None)
        raise CheckpointError(
            f"the plan's layer {missing!r} is not found in this {type(model).__name__}. Pass the "
            "model that was patched, not a part of it."
            if missing is not None
            else f"this {type(model).__name__} holds {len(found)} patched layers, and the plan has "
            f"{len(names)}. Pass the model that was patched, not one that it is a part of."
        )
    return by_name


def _base_fingerprints(modules: Mapping[str, SMTLayer]) -> dict[str, Any]:
    return {
        name: _fingerprint(m.layer_plan.shape, m.original_blocks) for name, m in modules.items()
    }


def _fingerprint(shape: tuple[int, int], original_blocks: Tensor) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "dtype": _dtype_name(original_blocks.dtype),
        "sha256": _sha256_of_tensor(original_blocks),
    }


def _check_base(
    directory: str | os.PathLike[str],
    name: str,
    module: SMTLayer,
    base: Mapping[str, Any] | None,
    strict: bool,
) -> None:
    where = os.fspath(directory)
    if base is None:
        raise CheckpointError(
            f"{where!r} has no fingerprint of {name!r}: smt_blocks.json is damaged"
        )
    original = module.original_blocks
    if not strict:
        return
    if base["dtype"] != _dtype_name(original.dtype):
        raise CheckpointError(
            f"{name!r} has dtype {_dtype_name(original.dtype)}, but the blocks in {where!r} were "
            f"trained from a {base['dtype']} model. Load the base model in {base['dtype']}."
        )
    if base["sha256"] != _sha256_of_tensor(original):
        raise CheckpointError(
            f"{name!r} holds other values than the base model that the blocks in {where!r} were "
            "trained from. Load that base model; strict_base=False puts the blocks onto another one "
            "all the same."
        )


def _read_info(
    directory: str | os.PathLike[str], info_name: str, tensors_name: str, kind: str, known: int
) -> dict[str, Any]:
    root = Path(directory)
    recover_directory(root.absolute())
    path = root / info_name
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        inside = next((p.parent for p in sorted(root.glob(f"*/{info_name}"))), None)
        hint = "" if inside is None else f" Do you mean {str(inside)!r}?"
        raise CheckpointError(
            f"cannot read {str(path)!r}: {os.strerror(error.errno or 0)}. Expected a directory "
            f"that smt_ext saved, with {info_name} and {tensors_name} in it.{hint}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged or cut off: {error}") from None
    if not isinstance(info, dict) or info.get("format") != kind:
        raise CheckpointError(f"{str(path)!r} is no {kind} file")
    if info.get("version") != known:
        raise CheckpointError(
            f"{str(path)!r} has version {info.get('version')!r}, and this smt_ext reads {known}. "
            "Update smt_ext."
        )
    if info.pop("seal", None) != _sealed(info)["seal"]:
        raise CheckpointError(
            f"{str(path)!r} is damaged: its content does not match its checksum. Restore it from a "
            "copy, or save again."
        )
    tensors = root / tensors_name
    if not tensors.exists():
        raise CheckpointError(f"{str(tensors)!r} is missing, while {info_name} is there")
    if (found := sha256_of_file(tensors)) != info.get("sha256"):
        raise CheckpointError(
            f"{str(tensors)!r} is damaged or cut off: its sha256 is {found[:12]}..., expected "
            f"{str(info.get('sha256'))[:12]}... ({tensors.stat().st_size:,} bytes). Restore it from "
            "a copy, or save again."
        )
    try:
        info["plan"] = BlockPlan.from_json(json.dumps(info["plan"]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} holds no usable plan: {error}") from None
    return info


def _sealed(info: Mapping[str, Any]) -> dict[str, Any]:
    """``info`` with a checksum over itself."""
    text = json.dumps(info, sort_keys=True)
    return {**info, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None


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
        tensors[path] = whole.cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
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


def _random_state() -> dict[str, Any]:
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
        _set_random_state(by_rank[rank])
    if ranks.is_main() and len(by_rank) != world:
        without = f" The random states of ranks {len(by_rank)} to {world - 1} stay as they are."
        warnings.warn(
            f"{os.fspath(directory)!r} was saved with the random states of {len(by_rank)} ranks, and "
            f"{world} resume: random numbers, such as dropout's, differ from the run that never stopped."
            f"{without if len(by_rank) < world else ''}",
            stacklevel=3,
        )


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # There may be fewer devices than where it was saved.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _package_version() -> str:
    try:
        return version("smt_ext")
    except PackageNotFoundError:
        return "unknown"
