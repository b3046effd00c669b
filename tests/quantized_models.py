"""Small models whose linears are quantised, and what their weights are by the formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import tiny_llama
from smt_ext import BlockPlan, LayerPlan

SCHEMES = ("nf4", "nf4-double", "fp4", "bnb-int8", "torchao-int8", "torchao-int4")


def needs(scheme: str) -> str:
    """The library that a scheme is of."""
    return "torchao" if scheme.startswith("torchao") else "bitsandbytes"


def quantize(linear: nn.Linear, scheme: str) -> nn.Module:
    """A quantised linear of the same weight; ``linear`` itself is left alone."""
    n, k = linear.weight.shape
    bias = linear.bias is not None
    if scheme.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        out = nn.Linear(k, n, bias=bias, dtype=linear.weight.dtype)
        out.load_state_dict(linear.state_dict())
        config = Int8WeightOnlyConfig()
        if scheme == "torchao-int4":
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        quantize_(out, config)
        return out
    import bitsandbytes as bnb

    if scheme == "bnb-int8":
        out = bnb.nn.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
        out.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
    else:
        kind, _, double = scheme.partition("-")
        out = bnb.nn.Linear4bit(
            k, n, bias=bias, quant_type=kind, compress_statistics=bool(double), compute_dtype=None
        )
        weight = bnb.nn.Params4bit(
            linear.weight.detach().clone(),
            requires_grad=False,
            quant_type=kind,
            compress_statistics=bool(double),
            module=out,
        )
        out.weight = weight
    if bias:
        out.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return out.to("cpu")


def quantized(model: nn.Module, scheme: str, keep: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Every linear of the model quantised in place, but those whose name ends in ``keep``."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(keep):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantize(module, scheme))
    return model


class QuantMLP(nn.Module):
    """Siblings on one input and a ragged linear behind them; K is what bitsandbytes' blocks divide."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(128, 64, bias=True, dtype=dtype)
        self.up_proj = nn.Linear(128, 64, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(64, 50, bias=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


LAYERS = {
    "gate_proj": LayerPlan(shape=(64, 128), block_size=32, blocks=((0, 0), (0, 2), (1, 3))),
    "up_proj": LayerPlan(shape=(64, 128), block_size=32, blocks=((1, 0), (1, 1))),
    # Ragged in the rows: 50 = 32 + 18.
    "down_proj": LayerPlan(shape=(50, 64), block_size=32, blocks=((0, 1), (1, 0))),
}


def quant_mlp(scheme: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return quantized(QuantMLP(dtype), scheme, keep=("nothing",))


def quant_plan() -> BlockPlan:
    return BlockPlan(layers=LAYERS)


def quant_llama(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of two layers; the head is not quantised."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    return quantized(tiny_llama(dtype, **sizes), scheme)


def values_of(linear: nn.Module, scheme: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, K) of what the quantised linear multiplies by, from the library's own functions."""
    weight = linear.weight
    if scheme.startswith("torchao"):
        return weight.dequantize().to(dtype)
    if scheme == "bnb-int8":
        absmax = weight.SCB if linear.state.SCB is None else linear.state.SCB
        return weight.data.to(dtype).mul_(absmax.unsqueeze(1).mul(1.0 / 127.0))
    import bitsandbytes.functional as bnb

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
    )


def stored_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in a state dict, tensor subclasses taken apart."""
    bits = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            for part in value.__tensor_flatten__()[0]:
                bits[f"{name}.{part}"] = getattr(value, part).clone()
        else:
            bits[name] = value.clone()
    return bits
