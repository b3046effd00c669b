"""SpIEL-AG, a sparse fine-tuning baseline (Ansell, Vulic, Sterz, Korhonen, Ponti, 2024).

Written after the paper (arXiv 2401.16405, section 3) and the choices of its published code. Each
target weight has a fixed number of trained entries, in proportion to its size, and their deltas.
Every ``interval`` steps, entries are moved:

    drop   the k entries with the smallest |delta|
    grow   the k entries with the largest |accumulated gradient| among the candidates

The candidates are as many entries as are trained, those with the largest |gradient| in the first
batch of a selection; their gradients are summed over ``accumulate`` batches. k falls from
``rate`` of the entries to none by a cosine over the run; the first selection replaces all.
An entry that is dropped returns to its pretrained value. One that is grown starts with a delta of
zero, and with Adam's moments and age as its gradients of the selection give them.

This is for quality, not for speed: backward makes the dense dW of the layer at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import Optimizer

from smt_ext.nn.functional import autocast_dtype

__all__ = ["Spiel"]


class _SpielFunction(torch.autograd.Function):
    """F.linear whose backward gives the gradient of the deltas, and shows dW to the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deltas_M: Tensor, layer: SpielLayer) -> Tensor:
        ctx.x_dtype = x.dtype
        x = x.to(autocast_dtype(x))
        weight_NK = layer.linear.weight
        ctx.save_for_backward(x, weight_NK)
        ctx.layer = layer
        return F.linear(x, weight_NK.to(x.dtype), layer.linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        dw = (dy_TN.T @ x.reshape(-1, x.shape[-1])).float().flatten()
        ctx.layer.see(dw)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TN @ weight_NK.to(dy.dtype)).view(x.shape).to(ctx.x_dtype)
        return dx, dw[ctx.layer.indices_M], None


class SpielLayer:
    """The trained entries of one linear layer. The weight always holds base + delta.

    Attributes:
        indices_M: of the trained entries in the flattened weight.
        deltas_M: what was added to them; the parameter that trains.
    """

    def __init__(self, linear: nn.Linear, entries: int) -> None:
        self.linear = linear
        self.flat = linear.weight.detach().view(-1)
        self.indices_M = torch.randperm(self.flat.numel())[:entries].to(self.flat.device)
        self.base_M = self.flat[self.indices_M].clone()
        self.deltas_M = nn.Parameter(torch.zeros_like(self.base_M, dtype=torch.float32))
        self.selecting = False
        self.candidates: Tensor | None = None
        linear.forward = self._forward

    def _forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SpielFunction.apply(x, self.deltas_M, self)
        return out

    def see(self, dw: Tensor) -> None:
        """Accumulate the candidates' gradients while a selection is on."""
        if not self.selecting:
            return
        if self.candidates is None:
            self.candidates = dw.abs().topk(len(self.indices_M)).indices
            self.sum, self.squares = torch.zeros(2, len(self.indices_M), device=dw.device)
            self.batches = 0
        seen = dw[self.candidates]
        self.sum += seen
        self.squares += seen * seen
        self.batches += 1

    @torch.no_grad()
    def write(self) -> None:
        """Put base + delta into the weight."""
        self.flat[self.indices_M] = (self.base_M + self.deltas_M).to(self.flat.dtype)

    @torch.no_grad()
    def select(self, rate: float, optimizer: SpielAdamW) -> int:
        """Drop and grow; returns how many entries moved."""
        candidates, self.candidates, self.selecting = self.candidates, None, False
        k = int(rate * len(self.indices_M))
        if candidates is None or k == 0:
            return 0
        dropped = self.deltas_M.abs().topk(k, largest=False).indices
        kept = torch.zeros(self.flat.numel(), dtype=torch.bool, device=self.flat.device)
        kept[self.indices_M] = True
        kept[self.indices_M[dropped]] = False
        score = self.sum.abs().masked_fill(kept[candidates], -1.0)
        best = score.topk(k)
        grown = best.indices[best.values >= 0]
        # What would be dropped and grown at once stays as it is.
        stays = torch.isin(self.indices_M[dropped], candidates[grown])
        grown = grown[~torch.isin(candidates[grown], self.indices_M[dropped])]
        slots = dropped[~stays][: len(grown)]
        grown = grown[: len(slots)]
        self.flat[self.indices_M[slots]] = self.base_M[slots]
        self.indices_M[slots] = candidates[grown]
        self.base_M[slots] = self.flat[candidates[grown]]
        self.deltas_M[slots] = 0.0
        optimizer.seed(
            self.deltas_M, slots, self.sum[grown] / self.batches,
            self.squares[grown] / self.batches, self.batches,
        )  # fmt: skip
        return len(slots)


class SpielAdamW(Optimizer):
    """AdamW in which every entry has an age of its own, for the bias correction."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for param in params:
            self.state[param] = {
                name: torch.zeros_like(param) for name in ("age", "exp_avg", "exp_avg_sq")
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["age"] += 1
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(param.grad.square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** state["age"])
                square = state["exp_avg_sq"] / (1 - beta2 ** state["age"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))

    def seed(self, param: nn.Parameter, slots: Tensor, mean: Tensor, square: Tensor, age: int):
        """Moments of new entries, such that the bias correction gives ``mean`` and ``square``."""
        beta1, beta2 = self.param_groups[0]["betas"]
        state = self.state[param]
        state["age"][slots] = float(age)
        state["exp_avg"][slots] = mean * (1 - beta1**age)
        state["exp_avg_sq"][slots] = square * (1 - beta2**age)


class Spiel:
    """SpIEL-AG on a model: freezes it, and trains entries of its target weights.

    Call :meth:`before_step` ahead of each step's forward pass and :meth:`after_step` behind the
    optimizer's step.

    Args:
        model: its parameters are frozen, and the targets' forward is replaced.
        targets: the linear layers, by name.
        entries: trained in all.
        steps: of the run; the cosine of the drop rate ends there.
        interval: steps from one selection to the next. accumulate: batches of a selection.
        rate: share of the entries moved at the start.

    Attributes:
        moved: entries that each selection moved.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Linear],
        entries: int,
        steps: int,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        interval: int = 20,
        accumulate: int = 5,
        rate: float = 0.2,
    ) -> None:
        if accumulate >= interval:
            raise ValueError(f"accumulate is {accumulate}, expected less than interval, {interval}")
        model.requires_grad_(False)
        share = entries / sum(linear.weight.numel() for linear in targets.values())
        self.layers = {
            name: SpielLayer(linear, max(1, round(share * linear.weight.numel())))
            for name, linear in targets.items()
        }
        self.steps, self.interval, self.accumulate, self.rate = steps, interval, accumulate, rate
        self.parameters = [layer.deltas_M for layer in self.layers.values()]
        self.optimizer = SpielAdamW(self.parameters, lr, betas, weight_decay)
        self.moved: list[int] = []

    def before_step(self, step: int) -> None:
        """A selection begins with steps 0, interval, 2 interval, ..."""
        if step % self.interval == 0:
            for layer in self.layers.values():
                layer.selecting = True

    def after_step(self, step: int) -> None:
        """Write the deltas into the weights; end a selection that has seen its batches."""
        for layer in self.layers.values():
            layer.write()
        if step % self.interval == self.accumulate - 1:
            progress = (step + 1) / self.steps
            first = step < self.interval
            rate = 1.0 if first else self.rate * (1 + math.cos(math.pi * progress)) / 2
            self.moved.append(
                sum(layer.select(rate, self.optimizer) for layer in self.layers.values())
            )
