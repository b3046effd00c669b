"""Mixture-of-experts layers whose experts share one parameter (E, N, K).

The computation is that of transformers' ``grouped_mm`` experts: the tokens are copied once for each
expert they go to, sorted by expert, and every expert multiplies its stretch of them. A matrix of
experts trains like any other, as the (E * N, K) matrix of all experts one under the other; what
differs is that the blocks of an expert read the tokens of that expert only.

Letters as in :mod:`smt_ext.ops`; E experts, T tokens times the experts that each goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layouts import plain_class

__all__ = ["ExpertsForward", "GroupedUse", "TokensByExpert", "combined_class"]


@dataclass(frozen=True)
class TokensByExpert:
    """Which stretch of the sorted tokens belongs to which expert.

    Attributes:
        ends: (E,) int32 on the tokens' device, where each expert's stretch ends.
        stretches: (start, end) of each expert, on the host.
    """

    ends: Tensor
    stretches: list[tuple[int, int]]

    @staticmethod
    def of(expert_T: Tensor, num_experts: int) -> TokensByExpert:
        """From the sorted expert of every token; waits for the device once.

        On the meta device, where nobody knows, as if the tokens spread evenly.
        """
        if expert_T.is_meta:
            bounds = [len(expert_T) * i // num_experts for i in range(num_experts + 1)]
            ends = torch.tensor(bounds[1:], dtype=torch.int32, device="meta")
            return TokensByExpert(ends, list(pairwise(bounds)))
        ends = torch.bincount(expert_T, minlength=num_experts).cumsum(0, dtype=torch.int32)
        bounds = [0, *ends.tolist()]
        return TokensByExpert(ends, list(pairwise(bounds)))


class GroupedUse(Protocol):
    """What backward does with the gradient of a grouped weight, and needs of its input."""

    def keep(self, x_TK: Tensor, tokens: TokensByExpert) -> Sequence[Tensor]:
        """Owned tensors to save for :meth:`gradient`."""
        ...

    def gradient(
        self, dy_TN: Tensor, kept: Sequence[Tensor], tokens: TokensByExpert
    ) -> Tensor | None:
        """The gradient of the tensor that stands for the trained part of the weight."""
        ...


class _GroupedLinear(torch.autograd.Function):
    """Every expert's stretch of tokens times its matrix, differentiable in x and ``trained``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_ENK: Tensor,
        trained: Tensor | None,
        tokens: TokensByExpert,
        use: GroupedUse | None,
    ) -> Tensor:
        x = x_TK.to(weight_ENK.dtype)
        keeps = trained is not None and use is not None
        ctx.save_for_backward(weight_ENK, *(use.keep(x, tokens) if keeps and use else ()))
        ctx.x_dtype = x_TK.dtype
        ctx.tokens = tokens
        ctx.use = use
        return _grouped_mm(x, weight_ENK.transpose(1, 2), tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_ENK, *kept = ctx.saved_tensors
        dy_TN = dy.contiguous()
        dx = dtrained = None
        if ctx.needs_input_grad[0]:
            dx = _grouped_mm(dy_TN, weight_ENK, ctx.tokens).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            dtrained = ctx.use.gradient(dy_TN, kept, ctx.tokens)
        return dx, None, dtrained, None, None


class ExpertsForward(nn.Module):
    """Forward of an experts module through :meth:`_use_of`, which tells what trains."""

    def _use_of(self, parameter: str) -> tuple[Tensor | None, GroupedUse | None]:
        """The tensor that takes the gradient of a parameter's trained part, and its maker."""
        raise NotImplementedError

    def _grouped_forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden_states (tokens, K), top_k_index and top_k_weights (tokens, experts of a token)."""
        module: Any = self
        num_tokens, top_k = top_k_index.shape
        expert_T, order = torch.sort(top_k_index.reshape(-1))
        tokens = TokensByExpert.of(expert_T, module.num_experts)
        x_TK = hidden_states[order // top_k]
        if module.has_gate:
            hidden = module._apply_gate(self._multiply("gate_up_proj", x_TK, tokens))
        else:
            hidden = module.act_fn(self._multiply("up_proj", x_TK, tokens))
        y_TN = self._multiply("down_proj", hidden, tokens)
        weighted = y_TN * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        unsorted = weighted[order.argsort()].view(num_tokens, top_k, -1)
        return unsorted.sum(dim=1).to(hidden_states.dtype)

    def _multiply(self, parameter: str, x_TK: Tensor, tokens: TokensByExpert) -> Tensor:
        trained, use = self._use_of(parameter)
        out: Tensor = _GroupedLinear.apply(x_TK, getattr(self, parameter), trained, tokens, use)
        return out


_combined: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def combined_class(task: type[ExpertsForward], plain: type[nn.Module]) -> type[nn.Module]:
    """The class with the task in front of a module's own class, whose activation and gate stay."""
    if (task, plain) not in _combined:
        # Here and not at the method, since this imports the compiler, which takes a second.
        outside_graphs = torch.compiler.disable(
            task._grouped_forward,
            reason="how many tokens each expert gets is known at run time only",
        )
        members = {"__module__": __name__, "_grouped_forward": outside_graphs}
        _combined[task, plain] = type(f"{task.__name__}Of{plain.__name__}", (task, plain), members)
    return _combined[task, plain]


def rebuild(task: type[ExpertsForward], plain: type[nn.Module]) -> nn.Module:
    """An empty module of the combined class, for copy and pickle."""
    cls = combined_class(task, plain)
    return cls.__new__(cls)


def plain_forward(module: nn.Module, *args: Tensor) -> Tensor:
    """What the module computed before its class was swapped."""
    out: Tensor = plain_class(module).forward(module, *args)
    return out


def _grouped_mm(x_TK: Tensor, weight_EKN: Tensor, tokens: TokensByExpert) -> Tensor:
    """(T, N), one product an expert; in one launch where torch has a kernel for it."""
    if _has_grouped_mm(x_TK):
        return nn.functional.grouped_mm(x_TK, weight_EKN, offs=tokens.ends)
    out = x_TK.new_empty((x_TK.shape[0], weight_EKN.shape[2]))
    for expert, (start, end) in enumerate(tokens.stretches):
        if start < end:
            torch.mm(x_TK[start:end], weight_EKN[expert], out=out[start:end])
    return out


def _has_grouped_mm(x: Tensor) -> bool:
    if not hasattr(nn.functional, "grouped_mm") or x.dtype == torch.float64:
        return False
    if x.is_meta:
        return x.dtype == torch.bfloat16
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)
