"""Save and load trained blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from .._files import replace_directory, sha256_of_file, write_text
from ..distributed import sharding
from ..errors import CheckpointError, PatchError
from ..nn.modules import SMTLayer
from ..nn.patching import (
    check_trained,
    other_parameters,
    patch,
    patched_root,
    plan_of,
    restore_beside,
    smt_modules,
    train_also,
    unpatch,
)
from ..plan import BlockPlan
from . import block_sets
from .artifact import (
    about_base,
    check_base,
    fetched,
    fingerprint,
    modules_by_plan,
    one_writer,
    read_info,
    refuse_quantized,
    sealed,
    set_beside,
    set_blocks,
    source_of,
    stored_beside,
    whole_beside,
)
from .base_digest import digests_of_base

__all__ = [
    "BLOCKS_FILE",
    "BLOCKS_INFO",
    "load_blocks",
    "load_plan",
    "read_blocks_info",
    "save_blocks",
]

BLOCKS_FORMAT, BLOCKS_VERSION = "smt_ext.blocks", 2
BLOCKS_FILE, BLOCKS_INFO = "blocks.safetensors", "smt_blocks.json"


def save_blocks(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    readme: str | None = None,
    overwrite: bool = False,
) -> None:
    """Save the trained blocks: a few megabytes that turn the base model into the trained one.

    Writes ``blocks.safetensors`` (one tensor (S, L, L) a module, every other parameter that requires
    gradients, and every persistent buffer that training has changed) and ``smt_blocks.json`` (the plan,
    checksums, and digests of the whole base model). The directory appears whole or not at all; what was
    there before stays until then.

    Args:
        model: a patched model. Under ``fully_shard`` all ranks must call, and rank 0 writes.
        directory: made if need be, replaced if it exists.
        name: save this block set, which was loaded onto or merged on the model, instead.
        metadata: JSON values to keep with it, beside where a transformers model came from
            (``base_model``, ``base_revision``) and how it was quantised (``quantization``).
        overwrite: also replace a directory that holds other things than our saves.
        readme: text of a ``README.md`` beside the blocks, such as a model card.

    Raises:
        PatchError: the model is not patched, has no such block set, or holds a frozen parameter that has
            changed since it was patched.
        CheckpointError: the disk is full or not writable, or ``metadata`` or ``readme`` cannot be kept.
    """
    _check_extras(metadata, readme)
    if name is None:
        check_trained(model)
    content = _content(model) if name is None else _content_of_set(model, name)
    with one_writer(model) as writes:
        if writes:
            with replace_directory(directory, "trained blocks", overwrite=overwrite) as temporary:
                _write(temporary, content, {**source_of(model), **(metadata or {})})
                if readme is not None:
                    write_text(temporary / "README.md", readme)


def _check_extras(metadata: Mapping[str, Any] | None, readme: str | None) -> None:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata is a {type(metadata).__name__}, expected a dictionary.")
    try:
        json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"metadata holds what JSON cannot: {error}.") from None
    if readme is not None and not isinstance(readme, str):
        raise CheckpointError(f"readme is a {type(readme).__name__}, expected the text itself.")


def _content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and what is said of them; a collective if the model is sharded."""
    sharding.reshard(model)
    plan = plan_of(model)
    modules = modules_by_plan(model, plan)
    blocks = {
        f"{name}.blocks": sharding.full(m.blocks.detach()).cpu().contiguous()
        for name, m in modules.items()
    }
    others = whole_beside(model)
    about = {**about_base(model, modules), "parameters": list(others)}
    return {**blocks, **others}, {**about, "plan": json.loads(plan.to_json())}


def _content_of_set(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a block set that is loaded onto the model."""
    chosen = block_sets.block_set(model, name)
    layers = chosen.plan.layers
    base = {k: fingerprint(layers[k].shape, v) for k, v in chosen.originals.items()}
    with block_sets.base_weights(model):
        digests = digests_of_base(model, leave_out=())
    blocks = {f"{k}.blocks": value.cpu().contiguous() for k, value in chosen.blocks.items()}
    return blocks, {"base": base, "model": digests, "plan": json.loads(chosen.plan.to_json())}


def _write(
    directory: Path,
    content: tuple[dict[str, Tensor], dict[str, Any]],
    metadata: Mapping[str, Any],
) -> None:
    blocks, about = content
    save_file(blocks, directory / BLOCKS_FILE, metadata={"format": "pt"})
    info = {
        "format": BLOCKS_FORMAT,
        "version": BLOCKS_VERSION,
        "smt_ext": __version__,
        "torch": torch.__version__,
        "sha256": sha256_of_file(directory / BLOCKS_FILE),
        **about,
        "metadata": metadata,
    }
    write_text(directory / BLOCKS_INFO, json.dumps(sealed(info), indent=1) + "\n")


def read_blocks_info(
    directory: str | os.PathLike[str], *, whole: bool = False, older: bool = True
) -> dict[str, Any]:
    """The checked content of ``smt_blocks.json``, with ``plan`` as a BlockPlan.

    ``base_dtype`` is the dtype that the base model had in training; ``tensors``, where the ``whole`` is
    asked for, those of the file.

    Raises:
        CheckpointError: missing, damaged, of an unknown version, or its tensors do not match.
    """
    directory = fetched(directory, BLOCKS_INFO, BLOCKS_FILE)
    info = read_info(
        directory, BLOCKS_INFO, BLOCKS_FILE, BLOCKS_FORMAT, BLOCKS_VERSION, whole=whole, older=older
    )
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

    A model that is not patched is patched with the stored plan. Parameters that trained beside the
    blocks are loaded too, and train again (see :func:`smt_ext.train_also`), as are buffers that had
    changed; others that train beside the blocks of a patched model, and other buffers, are as before
    training. Everything is checked before a weight changes.

    With a ``name`` the model stays as it is, and the blocks are kept beside it: several sets can be
    loaded onto one base model, and :func:`smt_ext.block_sets.activate` switches between them. That costs
    S x L x L values twice on the CPU for each set: the blocks, and the base model's own.

    Args:
        model: the base model, or one patched with the same plan; with a ``name``, not patched.
        directory: from :func:`save_blocks`, or the name of such a folder on the hub.
        name: keep the blocks as a set of this name, not yet active.
        strict_base: require the whole base model to be that of training. False loads the blocks onto
            any model of the same shapes, with a warning that names the first tensor that differs.

    Returns:
        ``model``.

    Raises:
        CheckpointError: a damaged artefact, or another base model; names the first module that
            differs. The model is left as it was.
        PatchError: the model is patched with another plan, or, with a ``name``, patched at all; the
            name is taken, or other parameters trained too, which sets do not switch.
    """
    info = read_blocks_info(directory, whole=True, older=not strict_base)
    plan: BlockPlan = info["plan"]
    tensors: dict[str, Tensor] = info["tensors"]
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
        modules = modules_by_plan(model, plan)
        _check_blocks(directory, model, modules, info, tensors, strict_base)
        others = stored_beside(directory, model, info, tensors)
        # In the order of the file: ranks gather their shards of each.
        parameters = dict(patched_root(model).named_parameters())
        training = {name for name, p in other_parameters(model).items() if p.requires_grad}
        train_also(model, [n for n in others if n in parameters and n not in training])
    except BaseException:
        if not was_patched:
            unpatch(model)
        raise
    restore_beside(model)  # what the artefact does not hold did not train
    set_beside(model, others)
    with torch.no_grad():
        for layer, module in modules.items():
            set_blocks(module, tensors[f"{layer}.blocks"])
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
    if others := stored_beside(directory, model, info, tensors):
        raise PatchError(
            f"{next(iter(others))!r} trained beside the blocks in {os.fspath(directory)!r}, and a block "
            "set switches blocks alone. Load it without a name."
        )
    plan: BlockPlan = info["plan"]
    with block_sets.base_weights(model):
        # Patching checks all that there is to check, and reads the base's own blocks.
        patch(model, plan)
        try:
            modules = modules_by_plan(model, plan)
            refuse_quantized(modules, f"block set {name!r} cannot be switched on in")
            _check_blocks(directory, model, modules, info, tensors, strict_base)
            originals = {layer: module.original_blocks for layer, module in modules.items()}
        finally:
            unpatch(model)
    blocks = {layer: tensors[f"{layer}.blocks"] for layer in originals}
    block_sets.add_block_set(model, name, block_sets.BlockSet(plan, blocks, originals))


def _check_blocks(
    directory: str | os.PathLike[str],
    model: nn.Module,
    modules: Mapping[str, SMTLayer],
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    strict_base: bool,
) -> None:
    check_base(directory, model, modules, info, strict_base)
    for name, module in modules.items():
        stored = tensors.get(f"{name}.blocks")
        if stored is None or stored.shape != module.blocks.shape:
            found = "none" if stored is None else tuple(stored.shape)
            raise CheckpointError(
                f"{os.fspath(directory)!r}: blocks of {name!r} have shape {found}, expected "
                f"{tuple(module.blocks.shape)}. The artefact is damaged; save it again."
            )
