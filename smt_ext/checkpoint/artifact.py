"""What all artefacts have in common: reading, sealing, and the base model and plan they belong to.

An artefact is a directory with a tensors file and a JSON file about it, which holds the plan, the
tensors file's checksum, digests of the base model, and a seal: a checksum over itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._files import ATTEMPTS, identity, is_being_saved, resolved, settle, sha256_of_file
from ..distributed import ranks, sharding
from ..errors import CheckpointError, PatchError, first_line
from ..nn.modules import SMTLayer
from ..nn.other_parameters import persistent_buffers
from ..nn.patching import changed_buffers, other_parameters, patched_root, smt_modules
from ..nn.quantized import SMTQuantizedLinear
from ..plan import BlockPlan
from .base_digest import digest_of_config, digests_of_base
from .fresh_parameters import fresh_parameters

__all__ = [
    "about_base",
    "any_sharded",
    "check_base",
    "fetched",
    "fingerprint",
    "modules_by_plan",
    "one_writer",
    "read_info",
    "read_json",
    "refuse_quantized",
    "sealed",
    "set_beside",
    "set_blocks",
    "stored_beside",
    "whole_beside",
    "write_together",
]

_SAMPLED = 64
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be anything.

    Raises:
        OSError: not to be read.
        ValueError: no JSON, or one that is no object, or nested beyond reason.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(info, dict):
        raise ValueError(f"it holds a {type(info).__name__}, expected an object")
    return info


def fetched(directory: str | os.PathLike[str], *files: str) -> str | os.PathLike[str]:
    """A folder as it is; of a name such as ``org/name`` that is none, the files from the hub.

    Raises:
        CheckpointError: neither a folder nor to be had from the hub.
    """
    name, root = os.fspath(directory), resolved(directory)
    settle(root)
    if root.exists() or not _HUB_NAME.fullmatch(name) or find_spec("huggingface_hub") is None:
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(name, allow_patterns=list(files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and it cannot be fetched from the hub: {first_line(error)}"
        ) from None


def read_info(
    directory: str | os.PathLike[str],
    info_name: str,
    tensors_name: str,
    kind: str,
    known: int,
    *,
    whole: bool = False,
    older: bool | None = False,
) -> dict[str, Any]:
    """The checked content of an artefact's JSON file, with ``plan`` as a BlockPlan.

    Args:
        whole: also the tensors, under ``tensors``.
        older: also read version 1, which was tied to the base model's selected blocks alone; None
            where nothing can.

    Raises:
        CheckpointError: missing, damaged, of another kind or version, or its tensors do not match.
    """
    root = resolved(directory)
    names = (info_name, tensors_name)
    places = (root, *(root / name for name in names))
    for _ in range(ATTEMPTS):  # a save may take the place of what is being read
        settle(root)
        before = identity(*places)
        try:
            info = _read_info(root, *names, kind, known, older)
            if whole:
                info["tensors"] = _load_tensors(root / tensors_name)
        except Exception:  # a file that goes away meanwhile is any error at all to its reader
            between = before[0] is None and is_being_saved(root)  # two renames
            if identity(*places) == before and not between:
                raise
        else:
            if identity(*places) == before:
                return info
    raise CheckpointError(f"{str(root)!r} is saved again while it is read, time after time")


def _read_info(
    root: Path, info_name: str, tensors_name: str, kind: str, known: int, older: bool | None
) -> dict[str, Any]:
    path = root / info_name
    try:
        info = read_json(path)
    except OSError as error:
        inside = next((p for p in _subfolders(root) if (p / info_name).is_file()), None)
        hint = "" if inside is None else f" Do you mean {str(inside)!r}?"
        raise CheckpointError(
            f"cannot read {str(path)!r}: {os.strerror(error.errno or 0)}. Expected a directory "
            f"that smt_ext saved, with {info_name} and {tensors_name} in it.{hint}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged or cut off: {error}") from None
    if info.get("format") != kind:
        raise CheckpointError(f"{str(path)!r} is no {kind} file")
    found = info.get("version")
    if type(found) is int and found == 1 and not older:
        if older is None:
            raise CheckpointError(
                f"{str(path)!r} has version 1: resume with the smt_ext that wrote it."
            )
        raise CheckpointError(
            f"{str(path)!r} has version 1, which names its base model by the selected blocks alone. If "
            "this is its base, load it with strict_base=False and save it again."
        )
    if type(found) is not int or found not in (known, 1):
        raise CheckpointError(
            f"{str(path)!r} has version {found!r}, and this smt_ext reads {known}. Update smt_ext."
        )
    try:
        sound = info.pop("seal", None) == sealed(info)["seal"]
    except RecursionError:
        sound = False
    if not sound:
        raise CheckpointError(
            f"{str(path)!r} is damaged: its content does not match its checksum. Restore it from a "
            "copy, or save again."
        )
    tensors = root / tensors_name
    if not tensors.is_file():
        raise CheckpointError(f"{str(tensors)!r} is missing, while {info_name} is there")
    if (digest := sha256_of_file(tensors)) != info.get("sha256"):
        raise CheckpointError(
            f"{str(tensors)!r} is damaged or cut off: its sha256 is {digest[:12]}..., expected "
            f"{str(info.get('sha256'))[:12]!r}... ({tensors.stat().st_size:,} bytes). Restore it from "
            "a copy, or save again."
        )
    try:
        info["plan"] = BlockPlan.from_json(json.dumps(info["plan"]))
        if not info["base"]:
            raise ValueError("it names no layer")
        # Version 1 has none; join() raises TypeError for what is no text.
        info["parameters"] = ["".join([name]) for name in info.get("parameters", [])]
        for base in info["base"].values():
            getattr(torch, base["dtype"]).itemsize, base["shape"], base["sha256"]
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{str(path)!r} holds no usable plan: {error!r}") from None
    return info


def sealed(info: Mapping[str, Any]) -> dict[str, Any]:
    """``info`` with a checksum over itself."""
    text = json.dumps(info, sort_keys=True)
    return {**info, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error!r}") from None


def about_base(model: nn.Module, modules: Mapping[str, SMTLayer]) -> dict[str, Any]:
    """What an artefact's JSON file says of a patched model's base; a collective if sharded."""
    base = {name: fingerprint(m.layer_plan.shape, _original(m)) for name, m in modules.items()}
    for name, module in modules.items():
        if isinstance(module, SMTQuantizedLinear):
            base[name]["quantization"] = module.packed.scheme.title
            base[name]["sample"] = _sample(module.packed.dequantize()).tolist()
    return {"base": base, "model": digests_of_base(model)}


def source_of(model: nn.Module) -> dict[str, str]:
    """For metadata: where a transformers model came from and how it was quantised, as far as it says."""
    root: Any = patched_root(model)
    config: Any = getattr(root, "config", None)
    found = {
        "base_model": getattr(config, "name_or_path", None),
        "base_revision": getattr(config, "_commit_hash", None),
        "base_config": digest_of_config(config),
    }
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        made = quantized if isinstance(quantized, dict) else quantized.to_dict()
        dtype = str(root.dtype).removeprefix("torch.")
        found["quantization"] = json.dumps({"config": made, "dtype": dtype}, default=str)
    return {name: value for name, value in found.items() if value and isinstance(value, str)}


def _sample(weight_NK: Tensor) -> Tensor:
    """Values of a weight from always the same places, by which two bases can be compared."""
    flat = weight_NK.detach().reshape(-1)
    places = torch.arange(_SAMPLED, device=flat.device) * 2654435761 % flat.numel()
    return flat[places].float().cpu()


def _original(module: SMTLayer) -> Tensor:
    """The blocks of before training, as the base in the weight's present dtype has them."""
    blocks = module.original_blocks
    return blocks if isinstance(module, SMTQuantizedLinear) else blocks.to(module.weight.dtype)


def fingerprint(shape: tuple[int, int], original_blocks: Tensor) -> dict[str, Any]:
    """Of one weight's selected blocks before training."""
    return {
        "shape": list(shape),
        "dtype": _dtype_name(original_blocks.dtype),
        "sha256": _sha256_of_tensor(original_blocks),
    }


def check_base(
    directory: str | os.PathLike[str],
    model: nn.Module,
    modules: Mapping[str, SMTLayer],
    info: Mapping[str, Any],
    strict: bool,
) -> None:
    """Require a patched model's base to be the one that an artefact was made from.

    But for values that no checkpoint of the model has, where the artefact stores the parameter whole.

    Args:
        strict: False warns of another base instead.

    Raises:
        CheckpointError: names the first layer or tensor that differs.
    """
    where = os.fspath(directory)
    for name in modules:
        if name not in info["base"]:
            raise CheckpointError(f"{where!r} has no fingerprint of {name!r}: it is damaged")
    made, here = info.get("metadata", {}).get("base_config"), source_of(model).get("base_config")
    if made and here and made != here:
        warnings.warn(
            f"the model's configuration is another than that of the base that {where!r} was made from: "
            "it computes otherwise, and may do worse.",
            stacklevel=3,
        )
    difference = _first_difference(where, model, modules, info)
    if difference is None:
        return
    if strict:
        raise CheckpointError(difference)
    warnings.warn(difference + _measured_difference(where, modules, info), stacklevel=3)


def _measured_difference(
    where: str, modules: Mapping[str, SMTLayer], info: Mapping[str, Any]
) -> str:
    """How far the patched weights, before training, are from those of a quantised base."""
    errors, sizes = {}, {}
    for name, module in modules.items():
        if "sample" not in info["base"][name]:
            continue
        if isinstance(module, SMTQuantizedLinear):
            here = module.packed.dequantize()
        else:
            here = sharding.full(sharding.like(module.weight_before_training(), module.weight))
        try:
            there = torch.tensor(info["base"][name]["sample"], dtype=torch.float32)
            if there.shape != (_SAMPLED,) or not there.isfinite().all():
                raise ValueError
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise CheckpointError(
                f"{where!r} has no usable sample of {name!r}: it is damaged"
            ) from None
        errors[name] = float((_sample(here) - there).square().sum())
        sizes[name] = float(there.square().sum()) or 1.0
    if not errors:
        return ""
    whole = (sum(errors.values()) / sum(sizes.values())) ** 0.5
    worst = max(errors, key=lambda name: errors[name] / sizes[name])
    return (
        f" By {_SAMPLED} values a layer, the weights here differ from those of training by {whole:.1%} "
        f"(relative root mean square), most in {worst!r}: {(errors[worst] / sizes[worst]) ** 0.5:.1%}."
    )


def _first_difference(
    where: str, model: nn.Module, modules: Mapping[str, SMTLayer], info: Mapping[str, Any]
) -> str | None:
    for name, module in modules.items():
        base, original = info["base"][name], _original(module)
        trained_on, found_in = base.get("quantization", "full precision"), "full precision"
        if isinstance(module, SMTQuantizedLinear):
            found_in = module.packed.scheme.title
        if trained_on != found_in:
            return (
                f"{name!r} is in {found_in}, but the blocks in {where!r} were trained on a base in "
                f"{trained_on}, whose other weights are rounded differently. Load the base as it was in "
                "training, or smt_ext.export there; strict_base=False takes this one all the same."
            )
        if base["dtype"] != _dtype_name(original.dtype):
            return (
                f"{name!r} has dtype {_dtype_name(original.dtype)}, but the blocks in {where!r} were "
                f"trained from a {base['dtype']} model. Load the base model in {base['dtype']}."
            )
        if base["sha256"] != _sha256_of_tensor(original):
            return _other_values(name, where)
    stored: Any = info.get("model")
    if info["version"] == 1:
        return None
    try:
        expected, trained = dict(stored["tensors"]), set(stored["trained"])
    except (KeyError, TypeError, ValueError):
        return f"{where!r} has no usable digests of its base model: it is damaged"
    found = digests_of_base(model, leave_out=trained)["tensors"]
    for name in expected.keys() | found.keys():
        if name not in found:
            return f"this model has no tensor {name!r}, which the base model of {where!r} had"
        if name not in expected:
            return f"this model has a tensor {name!r}, which the base model of {where!r} had not"
    differing = [name for name in expected if expected[name] != found[name]]
    if stored_whole := set(info["parameters"]).intersection(differing):
        # What no checkpoint has, such as a new head, is random in each process.
        fresh = {name for name, _ in fresh_parameters(patched_root(model))} & stored_whole
        differing = [name for name in differing if name not in fresh]
    return _other_values(differing[0], where) if differing else None


def _other_values(name: str, where: str) -> str:
    return (
        f"{name!r} holds other values than the base model that the blocks in {where!r} were trained "
        "from. Load that base model, in its dtype; strict_base=False takes another one all the same."
    )


def refuse_quantized(modules: Mapping[str, SMTLayer], what: str) -> None:
    """Raise PatchError where something would have to be written into a quantised weight."""
    for name, module in modules.items():
        if isinstance(module, SMTQuantizedLinear):
            raise PatchError(
                f"{what} {name!r}, whose weight is stored in {module.packed.scheme.title} and cannot be "
                "written. Load the blocks without a name, or use an exported model."
            )


def set_blocks(module: SMTLayer, blocks: Tensor) -> None:
    """Take over blocks (S, L, L), whole on every rank."""
    sharding.local(module.blocks).copy_(sharding.shard_of(blocks, module.blocks))
    module.write_blocks_()


def whole_beside(model: nn.Module) -> dict[str, Tensor]:
    """Values of what training changes beside the blocks, on the CPU; a collective if sharded."""
    beside = {**other_parameters(model), **changed_buffers(model)}
    # Owned: two buffers may lie in one memory, which safetensors refuses.
    return {
        name: sharding.full(t.detach()).to("cpu", copy=True).contiguous()
        for name, t in beside.items()
    }


@torch.no_grad()
def set_beside(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Take over values of parameters and buffers, whole on every rank."""
    found = _parameters_and_buffers(model)
    for name, value in values.items():
        part = sharding.local(found[name].detach())
        part.copy_(sharding.shard_of(value, found[name]))


def _parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    root = patched_root(model)
    buffers = {name: getattr(owner, key) for name, owner, key in persistent_buffers(root)}
    return {**dict(root.named_parameters()), **buffers}


def stored_beside(
    directory: str | os.PathLike[str],
    model: nn.Module,
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Values that an artefact holds of parameters that trained, and buffers that changed.

    Raises:
        CheckpointError: names the first that is not in the file, or not in the model in this shape.
    """
    where, names = os.fspath(directory), info["parameters"]
    found = _parameters_and_buffers(model)
    for name in names:
        value, parameter = tensors.get(name), found.get(name)
        if value is None:
            raise CheckpointError(f"{where!r} holds no value of {name!r}: it is damaged")
        if parameter is None or parameter.shape != value.shape:
            has = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise CheckpointError(
                f"{name!r} of shape {tuple(value.shape)} trained beside the blocks in {where!r}, and "
                f"this model has {has}. Load the base model of training."
            )
    return {name: tensors[name] for name in names}


def modules_by_plan(model: nn.Module, plan: BlockPlan) -> dict[str, SMTLayer]:
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


def one_writer(model: nn.Module) -> AbstractContextManager[bool]:
    """Whether this rank writes: of a sharded model rank 0 does, and the others wait for it."""
    return write_together(any_sharded(smt_modules(model)))


@contextmanager
def write_together(together: bool) -> Iterator[bool]:
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


def any_sharded(modules: Mapping[str, SMTLayer]) -> bool:
    return any(sharding.is_sharded(module.blocks) for module in modules.values())


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []


def _sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
