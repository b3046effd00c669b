"""The patched experts of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PatchError
from ..layouts import ExpertMatrix, Matrix, plain_class, restore_class_, swap_class_
from ..plan import LayerPlan
from .experts import ExpertsForward, TokensByExpert, combined_class, plain_forward, rebuild
from .functional import accumulates_into
from .modules import InputGroup, SMTLayer

__all__ = ["ExpertInputGroup", "SMTExpertWeight", "SMTExperts"]

# A child module holds the blocks of the parameter whose name follows.
_PREFIX = "smt_"


@dataclass(frozen=True)
class _Expert:
    """One expert with selected blocks: they are blocks[begin:end] of the whole matrix."""

    index: int
    begin: int
    end: int
    layer: LayerPlan
    group: InputGroup


class ExpertInputGroup:
    """The input columns that each expert gathers of its own tokens; see :class:`InputGroup`.

    Attributes:
        experts: those with selected blocks.
        in_features: K for each expert that a token goes to.
        width: columns gathered per token, if tokens spread evenly over the experts.
    """

    def __init__(self, layer: LayerPlan, matrix: ExpertMatrix) -> None:
        num_experts, n, k = matrix.weight.shape
        block_rows = n // layer.block_size
        self.experts: list[_Expert] = []
        for index in range(num_experts):
            blocks = [(r, c) for r, c in layer.blocks if r // block_rows == index]
            if not blocks:
                continue
            begin = self.experts[-1].end if self.experts else 0
            own = LayerPlan(
                shape=(n, k),
                block_size=layer.block_size,
                blocks=tuple((r % block_rows, c) for r, c in blocks),
            )
            self.experts.append(_Expert(index, begin, begin + len(blocks), own, InputGroup([own])))
        config = getattr(matrix.experts, "config", None)
        per_token = getattr(config, "num_experts_per_tok", None) or 1
        self.in_features = k * per_token
        self.width = round(sum(e.group.width for e in self.experts) * per_token / num_experts)

    def slots(self, layer: LayerPlan) -> Tensor:
        """Position of each block within the columns that its expert gathers, (S,) int32."""
        return torch.cat([expert.group.slots(expert.layer) for expert in self.experts])

    def tiles(self, layer: LayerPlan, *, tall: bool) -> tuple[None, None]:
        """None: each expert's blocks are multiplied by themselves."""
        return None, None

    def to(self, device: torch.device) -> None:
        """Move the indices; called when the module moves."""
        for expert in self.experts:
            expert.group.to(device)


class SMTExpertWeight(SMTLayer):
    """Selected blocks of one parameter (E, N, K) that holds the matrices of all experts.

    A child of the patched experts module, which owns the parameter. To plans, optimizers and files it
    is one layer of shape (E * N, K).
    """

    _input_group: ExpertInputGroup  # type: ignore[assignment]
    bias = None  # type: ignore[assignment]

    def __init__(self, matrix: ExpertMatrix) -> None:
        super().__init__()
        # Not as a child: the experts module is this one's parent.
        self.__dict__["_experts"] = matrix.experts
        self.parameter = matrix.parameter

    @property
    def matrix(self) -> ExpertMatrix:
        """Where the weight is."""
        return ExpertMatrix(self.__dict__["_experts"], self.parameter)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """(E, N, K)."""
        return self.matrix.weight

    @property
    def weight_NK(self) -> Tensor:
        """(E * N, K), a view."""
        return self.matrix.weight_NK

    def plan_name(self, name: str) -> str:
        parent, _, _ = name.rpartition(".")
        return f"{parent}.{self.parameter}" if parent else self.parameter

    def note_written(self) -> None:
        if "_parameters" in self.__dict__["_experts"].__dict__:  # else a copy in the making
            super().note_written()
        else:
            self._written = None

    def check_own(self) -> None:
        """Raise PatchError where a caller has put tensors into the layer for one call."""
        own, weight = self._own(), getattr(self.__dict__["_experts"], self.parameter)
        if own is not None and not own.are_of(self.blocks, weight):
            raise PatchError(
                f"{self.layer_name!r} was called with other tensors in place of its own "
                "(torch.func.functional_call), which patched experts do not know. Call a copy of the "
                "model that smt_ext.unpatch has turned back."
            )

    def keep(self, x_TK: Tensor, tokens: TokensByExpert) -> Sequence[Tensor]:
        """Every expert's columns of its own tokens."""
        return [
            expert.group.columns(x_TK[slice(*tokens.stretches[expert.index])], x_TK.dtype)
            for expert in self._input_group.experts
        ]

    def gradient(
        self, dy_TN: Tensor, kept: Sequence[Tensor], tokens: TokensByExpert
    ) -> Tensor | None:
        """(S, L, L); zero for an expert that no token went to."""
        self.check_trained()
        into = self.blocks.grad if self.accumulate_in_place else None
        if into is not None and not accumulates_into(self.blocks):
            into = None
        grad = torch.zeros_like(self.blocks) if into is None else into
        rows = self.block_rows % (self.weight.shape[1] // self.block_size)
        for expert, x_cols in zip(self._input_group.experts, kept, strict=True):
            start, end = tokens.stretches[expert.index]
            if start < end:
                blocks = slice(expert.begin, expert.end)
                ops.block_grad_acc_(
                    grad[blocks],
                    dy_TN[start:end],
                    x_cols,
                    rows[blocks],
                    self._block_slots[blocks],
                    self.block_size,
                )
        return grad if into is None else None

    @classmethod
    def _take_on_(cls, matrix: Matrix) -> SMTLayer:
        assert isinstance(matrix, ExpertMatrix)
        experts = matrix.experts
        if not isinstance(experts, SMTExperts):
            swap_class_(experts, combined_class(SMTExperts, type(experts)))
        child = cls(matrix)
        experts.add_module(_PREFIX + matrix.parameter, child)
        return child

    def _let_go_(self) -> nn.Module:
        experts: nn.Module = self.__dict__["_experts"]
        del experts._modules[_PREFIX + self.parameter]
        if not any(isinstance(child, SMTExpertWeight) for child in experts.children()):
            restore_class_(experts)
        return experts


class SMTExperts(ExpertsForward):
    """An experts module of transformers with blocks that train; by class swap, like SMTLinear.

    Without gradients it computes by the implementation that the model is set to, with gradients in
    the way of ``grouped_mm``.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for child in self._weights():
            child.check_own()
            child.write_changed_blocks_()
        trains = any(child.blocks.requires_grad for child in self._weights())
        if not (torch.is_grad_enabled() and trains):
            return plain_forward(self, hidden_states, top_k_index, top_k_weights)
        return self._grouped_forward(hidden_states, top_k_index, top_k_weights)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; what is assigned is the layer's own from now on."""
        super().register_parameter(name, param)
        for child in self._weights():
            child.take_for_own()

    def _use_of(self, parameter: str) -> tuple[Tensor | None, SMTExpertWeight | None]:
        child = cast(SMTExpertWeight | None, self._modules.get(_PREFIX + parameter))
        if child is None or not child.blocks.requires_grad:
            return None, None
        child.check_trained()
        return child.blocks, child

    def _weights(self) -> list[SMTExpertWeight]:
        return [child for child in self.children() if isinstance(child, SMTExpertWeight)]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for child in self._weights():
            child.write_before_saving_()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> SMTExperts:
        before = [(child, child.weight.dtype, child._settle()) for child in self._weights()]
        # The children move before the parameters that they describe.
        for child in self.children() if recurse else ():
            child._apply(fn)
        for child, _, _ in before:
            child.__dict__["_counters"] = None
        super()._apply(fn, recurse=False)
        for child, dtype, written in before:
            child._note_moved(dtype, written)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for child in self._weights():
            # Where the state has blocks too, the child loads them after this.
            if prefix + child.parameter in state_dict:
                child._read_blocks_from_weight_()

    def __reduce__(self) -> tuple[Any, ...]:
        for child in self._weights():
            child.write_before_saving_()
        return rebuild, (SMTExperts, plain_class(self)), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for child in self._weights():
            child.note_written()
