"""Models of shapes without values, from a configuration alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import DataError
from ..hf.loading import require_transformers, resolve_model

__all__ = ["PRESETS", "meta_model", "model_config"]

# Names of attention implementations, registered with transformers below.
_PLAIN, _PADDED = "smt_ext_sdpa", "smt_ext_sdpa_padded"

# Published configurations, so that estimates for them need no download.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
    },
    "llama-13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}


def model_config(model: str | os.PathLike[str] | Any) -> Any:
    """The configuration of a model: one of PRESETS, a folder with config.json, a hub name, a .gguf
    file, or a configuration object itself.

    Raises:
        DataError: none of these; says what was looked for.
    """
    transformers = require_transformers()
    if isinstance(model, transformers.PreTrainedConfig):
        return model
    if isinstance(model, str) and model.lower() in PRESETS:
        return transformers.LlamaConfig(**PRESETS[model.lower()], tie_word_embeddings=False)
    name = resolve_model(model)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the configuration of {name!r}: {str(error).splitlines()[0]} Expected a "
            f"folder with config.json, a hub name that can be reached, or {', '.join(PRESETS)}."
        ) from None


def meta_model(config: Any, dtype: torch.dtype, *, padded: bool = False) -> nn.Module:
    """The causal language model of a configuration on the meta device, in training mode.

    Attention is transformers' ``sdpa`` on a flash kernel.

    Args:
        padded: attention takes a mask, as it does where a batch has padding.

    Raises:
        DataError: the configuration is not that of a causal language model.
    """
    transformers = require_transformers()
    # Under names that transformers makes no mask for: for its own "sdpa" it reads position ids to
    # see whether it needs one.
    transformers.AttentionInterface.register(_PLAIN, _attention)
    transformers.AttentionInterface.register(_PADDED, _padded_attention)
    try:
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_PADDED if padded else _PLAIN
            )
    except ValueError as error:
        raise DataError(
            f"cannot build a causal language model of type {config.model_type!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.train()


def _attention(*args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with _FlashKernel():
        return sdpa_attention_forward(*args, **kwargs)


def _padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> Any:
    """With a mask over a batch that has padding, one for all heads."""
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    return _attention(module, query, key, value, query.new_empty(shape, dtype=torch.bool), **kwargs)


class _FlashKernel(TorchFunctionMode):
    """Attention on the meta device as the flash kernels compute it: no (sequence x sequence) tensor.

    torch picks its attention kernel by device, and for the meta device it picks the plain formula.
    What the flash kernels of CPU and CUDA keep is the same: query, key, value, output, one float32
    a row and head, and the mask if there is one.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        return func(*args, **kwargs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # torch makes an additive mask of it for every layer, and keeps that.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out
