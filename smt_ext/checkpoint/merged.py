"""Write the trained model as an ordinary checkpoint that knows nothing of smt_ext."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from .._files import replace_directory
from ..distributed import sharding
from ..errors import PatchError
from ..nn.modules import SMTLayer
from ..nn.patching import plan_of
from ..nn.quantized import SMTQuantizedLinear
from ..quantization import packed_weight, why_unusable
from .artifact import one_writer

__all__ = ["export_merged"]


def export_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Save a patched Hugging Face model, blocks merged, for ``from_pretrained(directory)``.

    The weights hold the trained values at all times, so this only leaves the blocks out. Quantised
    weights go out dequantised, with the trained blocks in their places. The model stays patched and
    can go on training. The directory appears whole or not at all.

    Args:
        model: a patched model with ``save_pretrained``. Under ``fully_shard`` all ranks must call, and
            rank 0, which gathers the weights in its main memory, writes.
        directory: made if need be, replaced if it exists.
        tokenizer: saved beside the model where given.
        dtype: of dequantised weights. Default: that of the model, as its configuration has it.
        overwrite: also replace a directory that holds other things than our saves.

    Raises:
        PatchError: not patched, not a Hugging Face model, or a quantised layer that cannot be
            dequantised.
        CheckpointError: the disk is full or not writable.
    """
    plan_of(model)
    for name, module in model.named_modules():
        if (why := why_unusable(module)) is not None:
            raise PatchError(
                f"{name!r} {why}. A plain checkpoint cannot hold it: keep the blocks (save_blocks), "
                "and load them onto the quantised base."
            )
    saver: Any = model
    if not hasattr(model, "save_pretrained"):
        raise PatchError(
            f"{type(model).__name__} has no save_pretrained, so there is no Hugging Face checkpoint "
            "to write. Use smt_ext.unpatch(model) and torch.save(model.state_dict(), path)."
        )
    sharding.reshard(model)
    blocks = {f"{name}.blocks" for name, m in model.named_modules() if isinstance(m, SMTLayer)}
    with one_writer(model) as writes:
        state, failure = {}, None
        for name, value in model.state_dict().items():
            if name not in blocks:
                whole = sharding.full(value)
                # Out of memory, this rank gathers on: the others wait for it in every gather.
                if writes and failure is None:
                    try:
                        state[name] = whole.cpu() if sharding.is_sharded(value) else whole
                    except (MemoryError, RuntimeError) as error:
                        state, failure = {}, error
        if failure is not None:
            raise failure
        if not writes:
            return
        if quantized := {
            name: packed
            for name, module in model.named_modules()
            if (packed := packed_weight(module)) is not None
        }:
            of_model = getattr(model.config, "dtype", None)
            wide = dtype or of_model or next(iter(quantized.values())).dtype
            saver = _unquantized(model, wide)
            for name in quantized:
                _replace_packed(state, name, model.get_submodule(name), wide)
        with replace_directory(directory, "a model", overwrite=overwrite) as temporary:
            # The base's is not ours to judge: transformers saves no temperature without sampling, say.
            generation = getattr(model, "generation_config", None)
            try:
                if generation is not None:
                    saver.generation_config = type(generation)()
                saver.save_pretrained(temporary, state_dict=state)
            finally:
                if generation is not None:
                    saver.generation_config = generation
            if generation is not None:
                generation.to_json_file(temporary / "generation_config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)


def _unquantized(model: Any, dtype: torch.dtype) -> Any:
    """A model without values of the same configuration but for the quantisation."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        return type(model)(config)


def _replace_packed(
    state: dict[str, Tensor], name: str, module: nn.Module, dtype: torch.dtype
) -> None:
    """Put the dequantised weight where a layer's state dict has packed values and their scales."""
    packed = packed_weight(module)
    assert packed is not None
    for key in list(state):
        if key.startswith(f"{name}.") and key != f"{name}.bias":
            del state[key]
    if isinstance(module, SMTQuantizedLinear):
        values = module.dequantized(dtype)
    else:
        values = packed.dequantize(dtype)
    state[f"{name}.weight"] = values.cpu()
