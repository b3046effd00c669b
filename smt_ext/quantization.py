"""Frozen weights stored in four or eight bits, each read as one matrix (N, K).

- bitsandbytes: ``Linear4bit`` (NF4 and FP4, with and without double quantization) and
  ``Linear8bitLt``, which keep their weight packed.
- torchao: ``nn.Linear`` whose weight is a weight-only int4 or int8 tensor, as ``quantize_`` and
  transformers' ``TorchAoConfig`` make it.

Nothing here writes into a packed weight. What belongs to other libraries is known by name and
attributes, without importing it: where such a module exists, its library is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ops

__all__ = [
    "PackedWeight",
    "Scheme",
    "allow_broadcast",
    "allow_repacking",
    "logical_numel",
    "no_repacking",
    "packed_weight",
    "plain_parameters",
    "repacked",
    "stop_broadcast",
    "stop_repacking",
    "why_unusable",
]

_BNB = "bitsandbytes.nn.modules"
_BNB_4BIT = ("Linear4bit", "LinearNF4", "LinearFP4")
_TORCHAO_WEIGHT_ONLY = (
    "Int8Tensor",
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "Int4PlainInt32Tensor",
    "IntxUnpackedToInt8Tensor",
)

# Start of a class's module -> (what it is called, the way out).
_REFUSED = {
    "hqq.": (
        "HQQ",
        "quantize with bitsandbytes (BitsAndBytesConfig(load_in_4bit=True)) or torchao instead",
    ),
    "gptqmodel.": (
        "GPTQ or AWQ",
        "load the model that was quantized, with BitsAndBytesConfig(load_in_4bit=True), or dequantize",
    ),
    "auto_gptq.": (
        "GPTQ",
        "load the model that was quantized, with BitsAndBytesConfig(load_in_4bit=True), or dequantize",
    ),
    "awq.": (
        "AWQ",
        "load the model that was quantized, with BitsAndBytesConfig(load_in_4bit=True), or dequantize",
    ),
}


class Scheme(ABC):
    """How packed tensors turn into numbers. Hashable, and free of tensors.

    Attributes:
        shape: (N, K).
        title: for messages.
    """

    shape: tuple[int, int]
    title: str

    @abstractmethod
    def dequantize(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """(N, K) of ``dtype``: the bits that the quantising library itself multiplies by."""

    def overlaid(
        self,
        tensors: tuple[Tensor, ...],
        dtype: torch.dtype,
        blocks: Tensor,
        rows: Tensor,
        cols: Tensor,
    ) -> Tensor:
        """The same with blocks (S, L, L) in their places, rounded to ``dtype``."""
        weight = self.dequantize(tensors, dtype)
        ops.scatter_blocks_(weight, blocks, rows, cols)
        return weight


@dataclass(frozen=True)
class PackedWeight:
    """One quantised weight.

    Attributes:
        scheme: how to read it.
        tensors: all that its values come from, as the library stores it.
        dtype: floating-point dtype that it was quantised from.
    """

    scheme: Scheme
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scheme.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tensors[0].device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K), a new tensor."""
        with torch.no_grad():
            return self.scheme.dequantize(self.tensors, dtype)

    def stored(self) -> dict[str, Tensor]:
        """Plain tensors that hold every bit of it, by name: for digests and for counting bytes."""
        found: dict[str, Tensor] = {}
        for index, tensor in enumerate(self.tensors):
            if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
                found[str(index)] = tensor.detach().as_subclass(Tensor)
            else:
                for name in tensor.__tensor_flatten__()[0]:
                    found[f"{index}.{name}"] = getattr(tensor, name).detach()
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of :meth:`stored`."""
        return sum(t.numel() * t.element_size() for t in self.stored().values())


@dataclass(frozen=True)
class Bnb4bit(Scheme):
    """bitsandbytes' 4-bit types: packed (N*K/2,), table of 16 values, absmax per ``block_size`` values.

    With double quantization absmax is 8-bit itself: codes, their absmax, code table, offset.
    """

    shape: tuple[int, int]
    quant_type: str
    block_size: int
    nested_block_size: int | None

    @property
    def title(self) -> str:  # type: ignore[override]
        double = "" if self.nested_block_size is None else " with double quantization"
        return f"bitsandbytes {self.quant_type.upper()}{double}"

    def dequantize(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        out: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            tensors[0].view(-1, 1),
            self.absmax(tensors),
            self.block_size,
            self.quant_type,
            self.shape,
            dtype,
        )
        return out

    def absmax(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Scale of every ``block_size`` values, float32."""
        if self.nested_block_size is None:
            return tensors[2].float()
        _, _, codes, absmax, code, offset = tensors
        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            codes, absmax, code, self.nested_block_size, torch.float32
        )
        return scales + offset

    def overlaid(
        self,
        tensors: tuple[Tensor, ...],
        dtype: torch.dtype,
        blocks: Tensor,
        rows: Tensor,
        cols: Tensor,
    ) -> Tensor:
        # bitsandbytes' kernels take other digits for FP4 than its table has.
        if self.quant_type != "nf4" or not _has_kernel(tensors[0], dtype):
            return super().overlaid(tensors, dtype, blocks, rows, cols)
        packed, code, *_ = tensors
        return ops.dequantize_4bit_with_blocks(
            packed,
            self.absmax(tensors),
            code,
            self.block_size,
            self.shape,
            blocks.contiguous(),
            rows,
            cols,
            dtype,
        )


@dataclass(frozen=True)
class BnbInt8(Scheme):
    """bitsandbytes' 8-bit weight: int8 (N, K), absmax of every row (N,)."""

    shape: tuple[int, int]
    title: str = "bitsandbytes int8"

    def dequantize(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, absmax = tensors
        return codes.to(dtype, copy=True).mul_(absmax.unsqueeze(1).mul(1.0 / 127.0))

    def overlaid(
        self,
        tensors: tuple[Tensor, ...],
        dtype: torch.dtype,
        blocks: Tensor,
        rows: Tensor,
        cols: Tensor,
    ) -> Tensor:
        codes, absmax = tensors
        if not _has_kernel(codes, dtype):
            return super().overlaid(tensors, dtype, blocks, rows, cols)
        return ops.dequantize_int8_with_blocks(
            codes, absmax, blocks.contiguous(), rows, cols, dtype
        )


@dataclass(frozen=True)
class TorchAo(Scheme):
    """A tensor subclass of torchao, which knows its values itself."""

    shape: tuple[int, int]
    title: str

    def dequantize(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        (weight,) = tensors
        out: Tensor = cast(Any, weight).dequantize()
        return out.to(dtype)


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """The quantised weight of a linear module; None for any other.

    Only of modules that :func:`why_unusable` has nothing against.
    """
    kind = _kind(module)
    if kind is None or why_unusable(module) is not None:
        return None
    weight = cast(Any, module).weight
    if kind == "4bit":
        return _bnb_4bit(_state_4bit(module), weight.detach())
    if kind == "8bit":
        return _bnb_int8(module, weight)
    n, k = weight.shape
    return PackedWeight(
        TorchAo((n, k), f"torchao {type(weight).__name__}"), (weight,), weight.dtype
    )


def why_unusable(module: nn.Module) -> str | None:
    """Why a quantised module cannot train by blocks, and the way out; None where it can, or is none."""
    plain = _plain_class(module)
    for start, (name, way_out) in _REFUSED.items():
        if (plain.__module__ + ".").startswith(start):
            return (
                f"is a {plain.__name__}, quantized by {name}, which smt_ext cannot dequantize: "
                f"{way_out}"
            )
    kind = _kind(module)
    weight: Any = getattr(module, "weight", None)
    if kind is not None and hasattr(weight, "device_mesh"):
        return (
            "is quantised and sharded (fully_shard), which quantised bases do not support: use "
            "DistributedDataParallel, or a base in bfloat16"
        )
    if kind == "4bit":
        return _why_unusable_4bit(module)
    if kind == "8bit" and weight.dtype != torch.int8:
        return (
            "is a Linear8bitLt that holds no 8-bit weight: make it with has_fp16_weights=False (as "
            "BitsAndBytesConfig(load_in_8bit=True) does) and move it to its device, which quantizes it"
        )
    if kind == "8bit" and cast(Any, module).state.SCB is None and not hasattr(weight, "SCB"):
        return "is a Linear8bitLt whose parameter was made anew, without its scales: load it again"
    if kind == "torchao":
        name = type(weight).__name__
        acts = getattr(weight, "act_quant_kwargs", None) or getattr(
            weight, "activation_quantization", None
        )
        if name not in _TORCHAO_WEIGHT_ONLY or acts is not None:
            what = f"{name} that quantizes activations too" if acts is not None else name
            return (
                f"has a torchao weight of type {what}, expected weight-only int4 or int8: quantize with "
                "Int8WeightOnlyConfig, Int4WeightOnlyConfig or IntxWeightOnlyConfig"
            )
    return None


def logical_numel(parameter: Tensor) -> int:
    """Number of weights that a parameter stands for: a packed byte holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def plain_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of floating point whose dtype is that of their values: packed ones may be stored as one."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            yield parameter


@contextmanager
def no_repacking(model: nn.Module) -> Iterator[None]:
    """Inside, bitsandbytes leaves its 4-bit weights as they are.

    On CPUs with AVX-512 BF16 instructions a ``Linear4bit`` in eval mode rewrites its weight for
    faster inference at the first input without gradient. The rewritten layer rounds its scales to
    bfloat16 and lets no gradient through to its input, also in training.
    """
    stopped = stop_repacking(model)
    try:
        yield
    finally:
        for module in stopped:
            allow_repacking(module)


def stop_repacking(model: nn.Module) -> list[nn.Module]:
    """What :func:`no_repacking` does, until :func:`allow_repacking`; the modules concerned."""
    stopped = []
    for module in model.modules():
        if _kind(module) == "4bit" and getattr(module, _REPACKS, False):
            setattr(module, _REPACKS, False)
            stopped.append(module)
    return stopped


def allow_repacking(module: nn.Module) -> None:
    """Undo :func:`stop_repacking` for one module."""
    setattr(module, _REPACKS, True)


def stop_broadcast(model: nn.Module) -> list[str]:
    """Tell DistributedDataParallel to leave torchao's weights alone; their names.

    They are frozen, and do not know the operations by which it would send them from the first rank.
    """
    found = [f"{name}.weight" for name, m in model.named_modules() if _kind(m) == "torchao"]
    if found:
        setattr(model, _NOT_SENT, [*getattr(model, _NOT_SENT, ()), *found])
    return found


def allow_broadcast(model: nn.Module, names: list[str]) -> None:
    """Undo :func:`stop_broadcast`."""
    if names:
        setattr(model, _NOT_SENT, [n for n in getattr(model, _NOT_SENT, ()) if n not in names])


def repacked(model: nn.Module) -> str | None:
    """Name of a module whose weight bitsandbytes has rewritten for inference on the CPU."""
    return next(
        (n for n, m in model.named_modules() if _kind(m) == "4bit" and _is_repacked(m)), None
    )


def _has_kernel(packed: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused operator runs there and gives the library's bits."""
    return packed.device.type in ("cpu", "cuda", "meta") and dtype != torch.float64


_REPACKS = "support_avx512bf16_for_cpu"
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class before smt_ext swapped it (see :mod:`smt_ext.layouts`)."""
    plain: type[nn.Module] = module.__dict__.get("_plain_class", type(module))
    return plain


def _kind(module: nn.Module) -> str | None:
    plain = _plain_class(module)
    if plain.__module__ == _BNB:
        if plain.__qualname__ in _BNB_4BIT:
            return "4bit"
        return "8bit" if plain.__qualname__ == "Linear8bitLt" else None
    if plain is nn.Linear and type(module.weight).__module__.startswith("torchao."):
        return "torchao"
    return None


def _state_4bit(module: nn.Module) -> Any:
    """The quantisation state, which a parameter loses where others rebuild it; the module keeps it."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _is_repacked(module: nn.Module) -> bool:
    return bool(getattr(_state_4bit(module), "packing_format_for_cpu", False))


def _why_unusable_4bit(module: nn.Module) -> str | None:
    state = _state_4bit(module)
    if state is None:
        return (
            "is a Linear4bit whose weight is not quantized yet: move the model to its device first "
            "(model.to('cpu') or model.cuda()), which quantizes it"
        )
    if _is_repacked(module):
        return (
            "was rewritten by bitsandbytes for inference on the CPU, which rounds its scales and lets "
            "no gradient through: load the model again, and plan and patch it before its first forward"
        )
    k = state.shape[1]
    if module.weight.device.type == "cpu" and k % state.blocksize:
        return (
            f"has rows of {k} values, no multiple of the quantization block of {state.blocksize}, for "
            "which bitsandbytes computes with wrong scales on the CPU: train on a GPU, or quantize "
            "with a smaller blocksize"
        )
    return None


def _bnb_4bit(state: Any, packed: Tensor) -> PackedWeight:
    n, k = state.shape
    tensors: tuple[Tensor, ...] = (packed.as_subclass(Tensor), state.code, state.absmax)
    nested = None
    if state.nested:
        nested = state.state2.blocksize
        tensors += (state.state2.absmax, state.state2.code, state.offset)
    return PackedWeight(
        Bnb4bit((n, k), state.quant_type, state.blocksize, nested), tensors, state.dtype
    )


def _bnb_int8(module: Any, weight: Any) -> PackedWeight:
    # Moved from the parameter to the module's state by the first forward.
    absmax = module.state.SCB if module.state.SCB is not None else weight.SCB
    n, k = weight.shape
    # bitsandbytes quantises from float16.
    return PackedWeight(
        BnbInt8((n, k)), (weight.detach().as_subclass(Tensor), absmax), torch.float16
    )
