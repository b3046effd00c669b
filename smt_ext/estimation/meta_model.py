"""Models of shapes without values, from a configuration alone, made ready for each way to fine-tune."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, first_line
from ..hf.loading import resolve_model, transformers
from ..layouts import weight_NK
from ..nn.patching import patch_meta, status
from ..plan import BlockPlan
from ..planning.targets import select_targets

__all__ = ["METHODS", "PRESETS", "meta_model", "model_config", "prepare"]

# Method -> its title.
METHODS = {
    "full": "full",
    "full-master": "full, fp32 master",
    "lora": "LoRA",
    "dora": "DoRA",
    "smt": "SMT",
    "qlora": "QLoRA",
    "smt-4bit": "SMT, 4-bit",
}

# Published sizes, so that estimates for them need no download: vocabulary, hidden, MLP, layers, heads,
# heads of keys and values, context, whether the head is the embedding. Smallest first.
_SIZES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 8192, True),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, 8192, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 131072, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, 131072, True),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32, 2048, False),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 8192, False),
    "llama-13b": (32000, 5120, 13824, 40, 40, 40, 2048, False),
    "llama-30b": (32000, 6656, 17920, 60, 52, 52, 2048, False),
    "llama-65b": (32000, 8192, 22016, 80, 64, 64, 2048, False),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 8192, False),
}
_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
PRESETS = {name: dict(zip(_SETTINGS, sizes, strict=True)) for name, sizes in _SIZES.items()}

_ATTENTION = "smt_ext_causal"  # as transformers knows it, which makes no mask for foreign names


def model_config(model: str | os.PathLike[str] | Any) -> Any:
    """The configuration of a model: one of PRESETS, a folder with config.json, a hub name, a .gguf
    file, or a configuration object itself.

    Raises:
        DataError: none of these; says what was looked for.
    """
    if isinstance(model, transformers.PreTrainedConfig):
        return model
    if isinstance(model, str) and model.lower() in PRESETS:
        return transformers.LlamaConfig(**PRESETS[model.lower()])
    name = resolve_model(model)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # it raises what it likes of values that cannot be
        raise DataError(
            f"cannot load the configuration of {name!r}: {first_line(error)} Expected a "
            f"folder with config.json, a hub name that can be reached, or {', '.join(PRESETS)}."
        ) from None


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a configuration on the meta device, in training mode.

    Its configuration is a copy: the caller's stays as it is.

    Raises:
        DataError: the configuration is not that of a causal language model.
    """
    transformers.AttentionInterface.register(_ATTENTION, _attention)
    config = copy.deepcopy(config)
    config.use_cache = False
    config.pad_token_id = None  # models without a mask look for it in the values of token ids
    try:
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # its own code, at values that do not fit each other
        raise DataError(
            f"cannot build a causal language model of type {config.model_type!r}: {first_line(error)}"
        ) from error
    # Once it is made: GPT-J and others know attentions of their own alone, and get no mask by this.
    # Falcon calls torch's itself, if by that name.
    if model._supports_attention_backend or not model._supports_sdpa:
        model.config._attn_implementation = _ATTENTION
    made: nn.Module = model.train()
    return made


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None,
    scaling: float | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention as flash kernels compute it: no (sequence x sequence) tensor.

    On the meta device torch would take the plain formula. What the kernels of CPU and CUDA keep is the
    same: query, key, value, output, and one float32 a row and head.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = flash(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def prepare(
    method: str, model: nn.Module, plan: BlockPlan, rank: int | None
) -> tuple[nn.Module, str, int]:
    """The model as it trains, settings in words, and bytes that the optimizer will hold."""
    if method in ("qlora", "smt-4bit"):
        _quantize_(model)
    if method.startswith("smt"):
        patch_meta(model, plan)
        what = status(model)
        columns = f"{what.saved_bytes_per_token:,} bytes of input columns a token"
        return model, f"{plan.num_blocks:,} blocks, {columns}", what.moment_bytes
    if method.startswith("full"):
        model.requires_grad_(True)
        settings = "AdamW in the weights' dtype"
    else:
        model, settings = _with_adapters(model, plan, rank, dora=method == "dora")
    if method == "full-master":
        # The master copy and both moments in float32.
        return model, "AdamW in float32", 3 * 4 * sum(p.numel() for p in model.parameters())
    # The two moments, which torch.optim.AdamW makes like each parameter.
    return model, settings, sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)


def _with_adapters(
    model: nn.Module, plan: BlockPlan, rank: int | None, *, dora: bool
) -> tuple[nn.Module, str]:
    from peft import LoraConfig, get_peft_model

    # PEFT adapts modules; experts in one parameter stay as they are.
    matrices = select_targets(model, "all-linear").items()
    linears = {name: matrix for name, matrix in matrices if isinstance(matrix, nn.Module)}
    per_rank = sum(sum(weight_NK(linear).shape) for linear in linears.values())
    rank = rank or max(1, round(plan.num_parameters / per_rank))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=list(linears))
    with warnings.catch_warnings():
        # PEFT uses what transformers has deprecated; nothing that a user of estimates can change.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return adapted, f"r = {rank}, all linear layers"


def _quantize_(model: nn.Module) -> None:
    """Hold every linear but the output head in NF4 with double quantization."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    # Else bitsandbytes would keep one without values, made here, for all later calls of the process.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and linear is not head:
            weight, (n, k) = linear.weight.data, linear.weight.shape
            layer = Linear4bit(k, n, False, weight.dtype, device="meta")
            layer.weight = Params4bit(weight, quant_type="nf4", module=layer)._quantize("meta")
            layer.bias = linear.bias
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # read by PEFT
