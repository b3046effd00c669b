"""A model whose frozen linears are quantised by bitsandbytes, as BitsAndBytesConfig would load it."""

from __future__ import annotations

from typing import Any

from torch import nn

from smt_ext.quantization import stop_repacking

__all__ = ["BASES", "quantize_"]

BASES = ("nf4", "nf4-double", "int8")


def quantize_(model: Any, base: str) -> Any:
    """Replace every linear of a transformers model but the output head, in place.

    bitsandbytes' rewriting of 4-bit layers for inference on CPUs is off: a model that was evaluated
    would pass no gradient through them, and LoRA on it would hardly learn.
    """
    head = getattr(model, "lm_head", None)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized_linear(module, base))
    stop_repacking(model)
    model.is_loaded_in_4bit = base != "int8"  # as transformers' loading does; PEFT reads them
    model.is_loaded_in_8bit = base == "int8"
    return model


def quantized_linear(linear: nn.Linear, base: str) -> nn.Module:
    """A new module of the linear's weight, on its device; its input's dtype is that of the matmul."""
    import bitsandbytes as bnb

    device, bias = linear.weight.device, linear.bias is not None
    values = linear.weight.detach().clone()
    out: Any
    if base == "int8":
        out = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False
        )
        out.weight = bnb.nn.Int8Params(values, requires_grad=False)
    else:
        double = base == "nf4-double"
        out = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=bias, quant_type="nf4",
            compress_statistics=double,
        )  # fmt: skip
        out.weight = bnb.nn.Params4bit(
            values, requires_grad=False, quant_type="nf4", compress_statistics=double, module=out
        )
    if bias:
        out.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    moved: nn.Module = out.to(device)
    return moved
