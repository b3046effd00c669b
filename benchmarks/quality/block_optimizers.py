"""Optimizers of blocks to be judged by a run before anything of them enters the package.

    BlockAdam   Adam with the update of a matrix bounded by its root mean square (StableAdamW;
                Wortsman et al., 2023), or with one second moment a block row (Adam-mini; Zhang et
                al., 2024)
    BlockMuon   momentum of each block, orthogonalised (Muon; Jordan et al., 2024)

Parameters are blocks (S, L, L) of one matrix each. The zeros that pad ragged blocks would count as
entries; the harness's block sizes have none. The hook of :func:`smt_ext.patch` writes the
weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["BlockAdam", "BlockMuon"]


class BlockAdam(Optimizer):
    """AdamW whose second moment may be shared by a row, and whose update may be bounded.

    Args:
        rms_clip: the learning rate of a matrix is divided by RMS / rms_clip where that is above 1;
            RMS is the root mean square over the matrix of gradient / sqrt(second moment).
        row: one second moment for the L entries of a block row.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-8,
        rms_clip: float | None = None,
        row: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.rms_clip, self.row = rms_clip, row

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                square = param.grad.square()
                if self.row:
                    square = square.mean(-1, keepdim=True)
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(square)
                state["step"] += 1
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(square, 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** state["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                rate = group["lr"]
                if self.rms_clip is not None:
                    ratio = param.grad.square() / second.clamp(min=group["eps"] ** 2)
                    rate = rate / max(1.0, float(ratio.mean().sqrt()) / self.rms_clip)
                param.mul_(1 - rate * group["weight_decay"])
                param.sub_(rate * mean / (second.sqrt() + group["eps"]))


class BlockMuon(Optimizer):
    """Muon of each block by itself; an update's root mean square is 0.2, about that of Adam's.

    Args:
        momentum: Nesterov's.
    """

    RMS = 0.2

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - momentum)
                update = orthogonalised(param.grad.lerp(state["momentum"], momentum))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * self.RMS * param.shape[-1] ** 0.5 * update)


def orthogonalised(blocks_SLL: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each block's U D V^T, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = blocks_SLL / (blocks_SLL.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
