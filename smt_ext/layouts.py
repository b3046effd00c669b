"""The weights that can train by blocks, each seen as one matrix (N, K) however it is stored.

- ``nn.Linear`` stores (N, K), out_features x in_features.
- The ``Conv1D`` of transformers (GPT-2 and its kin) stores the transpose. The operators take any
  strides, so a transposed view will do.
- Layers of bitsandbytes and torchao store it in four or eight bits; see
  :mod:`smt_ext.quantization`.
- Mixture-of-experts layers of transformers hold the matrices of all experts in one parameter
  (E, N, K). They count as one matrix (E * N, K), expert under expert; see :mod:`smt_ext.nn.experts`.

What belongs to transformers is known by name and attributes, without importing it.

A module takes on a task (training, being scored) by a swap of its class: a class made of one layout
and one task, which brings the method ``_multiply``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .quantization import packed_weight, why_unusable

__all__ = [
    "SUPPORTED",
    "Conv1DLayout",
    "ExpertMatrix",
    "LinearLayout",
    "Matrix",
    "find_matrix",
    "is_conv1d",
    "is_supported",
    "matrices",
    "plain_class",
    "restore_class_",
    "shape_NK",
    "sharing_memory",
    "swap_class_",
    "tied_weights",
    "weight_NK",
    "why_not_called",
]

# For messages: what can be planned and patched.
SUPPORTED = "nn.Linear, transformers' Conv1D or experts, 4-bit or 8-bit of bitsandbytes or torchao"

_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# What transformers' use_experts_implementation leaves on a module, and the parameters it knows.
_EXPERTS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_is_expert_parallel")
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertMatrix:
    """The matrices of all experts of one layer, which share a parameter.

    Attributes:
        experts: the module that owns the parameter.
        parameter: its name there.
    """

    experts: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        """(E, N, K)."""
        weight = getattr(self.experts, self.parameter)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def weight_NK(self) -> Tensor:
        """(E * N, K), a view."""
        return self.weight.flatten(0, 1)


# What a plan's layer names: a linear module, or one parameter of an experts module.
Matrix: TypeAlias = nn.Module | ExpertMatrix


class _Task(Protocol):
    weight: Tensor

    def _multiply(self, x: Tensor, input: Tensor) -> Tensor:
        """``x @ weight_NK.T + bias``; ``input`` is the tensor that the module was called with."""
        ...


class LinearLayout:
    """A weight (N, K), multiplied by the input as it comes, as nn.Linear does."""

    @property
    def weight_NK(self: _Task) -> Tensor:
        """The weight."""
        return self.weight

    def forward(self: _Task, input: Tensor) -> Tensor:
        return self._multiply(input, input)


class Conv1DLayout:
    """A weight (K, N), multiplied by one matrix of tokens, which gives the bits of Conv1D."""

    stored_transposed = True

    @property
    def weight_NK(self: _Task) -> Tensor:
        """A transposed view of the weight."""
        return self.weight.t()

    def forward(self: _Task, input: Tensor) -> Tensor:
        y_TN = self._multiply(input.reshape(-1, input.shape[-1]), input)
        return y_TN.view(*input.shape[:-1], y_TN.shape[-1])


def matrices(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """Everything in a model that can train by blocks, by name, in the model's order."""
    for name, module in model.named_modules():
        if is_supported(module):
            yield name, module
        elif _is_experts(module):
            for parameter in _EXPERT_PARAMETERS:
                if hasattr(module, parameter):
                    yield (
                        f"{name}.{parameter}" if name else parameter,
                        ExpertMatrix(module, parameter),
                    )


def find_matrix(modules: Mapping[str, nn.Module], name: str) -> Matrix | None:
    """What a plan's layer names: a module, or a parameter of an experts module."""
    if name in modules:
        return modules[name]
    owner, _, parameter = name.rpartition(".")
    if parameter in _EXPERT_PARAMETERS and owner in modules and _is_experts(modules[owner]):
        return ExpertMatrix(modules[owner], parameter)
    return None


def is_supported(matrix: Matrix) -> bool:
    """Whether it is exactly of a class with a known layout.

    A subclass may compute something else, and would silently train wrongly.
    """
    if isinstance(matrix, ExpertMatrix):
        return True
    if why_unusable(matrix) is not None:
        return False
    known = plain_class(matrix) is nn.Linear or is_conv1d(matrix)
    return known or packed_weight(matrix) is not None


def why_not_called(matrix: Matrix) -> str | None:
    """Why the forward of another class would not run in its module's place, and the way out."""
    module = matrix.experts if isinstance(matrix, ExpertMatrix) else matrix
    own = vars(module).get("forward")
    if own is None or getattr(own, "__func__", None) is type(module).forward:  # as hooks leave it
        return None
    return (
        "has a forward of its own, as accelerate's dispatch sets it (device_map over several devices, "
        "offload), and would not call SMT's: take such hooks away "
        "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), with the model on one device"
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, or was one before its class was swapped."""
    plain = plain_class(module)
    return (plain.__module__, plain.__qualname__) == _CONV1D


def shape_NK(matrix: Matrix) -> tuple[int, int]:
    """(N, K) of :func:`weight_NK`, without reading it."""
    if isinstance(matrix, nn.Module) and (packed := packed_weight(matrix)) is not None:
        return packed.shape
    n, k = weight_NK(matrix).shape
    return n, k


def weight_NK(matrix: Matrix) -> Tensor:
    """The weight of a linear module or of experts as (N, K), a view where it is stored otherwise.

    Of a quantised module it is a new float32 tensor, which nothing can be written through.
    """
    if isinstance(matrix, ExpertMatrix):
        return matrix.weight_NK
    if (packed := packed_weight(matrix)) is not None:
        return packed.dequantize()
    weight = matrix.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(matrix) else weight


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before :func:`swap_class_`."""
    plain: type[nn.Module] = module.__dict__.get("_plain_class", type(module))
    return plain


def swap_class_(module: nn.Module, to: type[nn.Module]) -> None:
    """Change what a module computes in place: the object, its hooks and references to it stay."""
    plain = type(module)
    if why_not_called(module) is None:
        module.__dict__.pop("forward", None)  # which hooks have left: the old class's
    module.__class__ = to
    module.__dict__["_plain_class"] = plain


def restore_class_(module: nn.Module) -> None:
    """Undo :func:`swap_class_`."""
    if why_not_called(module) is None:
        module.__dict__.pop("forward", None)
    module.__class__ = module.__dict__.pop("_plain_class")


def _is_experts(module: nn.Module) -> bool:
    """Whether this is an experts module of transformers whose computation smt_ext knows."""
    if not all(hasattr(module, attribute) for attribute in _EXPERTS):
        return False
    weights = [getattr(module, p) for p in _EXPERT_PARAMETERS if hasattr(module, p)]
    return not (
        module.has_bias
        or module.is_transposed
        or module._is_expert_parallel
        or getattr(module, "has_post_expert_norm", False)
    ) and all(isinstance(w, nn.Parameter) and w.ndim == 3 and w.is_contiguous() for w in weights)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Module name -> another parameter's or buffer's name, for weights that share memory with it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.named_buffers(remove_duplicate=False)
    shared = sharing_memory([*parameters.items(), *buffers])
    return {name.removesuffix(".weight"): o for name, o in shared.items() if name in parameters}


def sharing_memory(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name -> another's name, for tensors that lie, in part at least, in the same memory.

    Between its first and its last entry a tensor counts as lying everywhere.
    """
    spans = sorted((*_span(tensor), name) for name, tensor in tensors if tensor.numel())
    shared: dict[str, str] = {}
    widest = ("", 0, 0, "")  # of those so far the one that ends last
    for span in spans:
        (place, start, end, name), other = span, widest[3]
        together = place == widest[0] and start < widest[2]
        if together:
            shared.setdefault(name, other)
            shared.setdefault(other, name)
        if not together or end > widest[2]:
            widest = span
    return shared


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Which memory, first byte, end."""
    made_of_others = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if made_of_others or tensor.layout != torch.strided:
        return "objects", id(tensor), id(tensor) + 1
    place, start = str(tensor.device), tensor.data_ptr()
    if tensor.is_meta:  # where all addresses are 0
        place = f"storage {tensor.untyped_storage()._cdata}"
        start = int(tensor.storage_offset()) * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    entries = 1 + sum((n - 1) * step for n, step in steps)
    return place, start, start + entries * tensor.element_size()
