"""Block scores of a model's linear layers, without ever storing a weight gradient.

Gradient metrics (SMT paper, section 3.1) run forward and backward over a few batches. For that time
the target layers compute through an autograd function whose backward reduces its layer's weight
gradient to block scores tile by tile. Nothing is updated, and no other gradient is computed than
the dX that leads to the targets. Whatever the metric, each backward also takes what the automatic
learning rate is made of: the loss, and the mean |gradient| of every block.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from .. import ops
from ..distributed import ranks
from ..errors import DataError, PlanError
from ..layouts import (
    Conv1DLayout,
    ExpertMatrix,
    LinearLayout,
    Matrix,
    is_conv1d,
    restore_class_,
    shape_NK,
    swap_class_,
    weight_NK,
)
from ..nn.experts import ExpertsForward, TokensByExpert, combined_class
from ..nn.functional import autocast_dtype
from ..nn.other_parameters import persistent_buffers
from ..nn.quantized import QuantizedLayout, with_layout
from ..plan import check_block_size
from ..quantization import PackedWeight, Scheme, no_repacking, packed_weight
from .budget import Scores
from .selection import Unit

logger = logging.getLogger("smt_ext")

__all__ = ["METRICS", "ScoredModel", "score_blocks"]

# Gradient metric -> what is taken of each block of each batch's gradient.
_GRADIENT = {"mean_abs": "mean_abs", "abs_mean": "mean", "l1": "l1", "l2": "l2"}
_FORWARD = ("activation", "wanda")
METRICS = (*_GRADIENT, *_FORWARD, "weight", "random")
_STATISTIC = "mean_abs"

LossFn = Callable[[nn.Module, Any], Tensor]


class _LayerScore:
    """What is summed over batches for one weight, and whether the present batch reached it."""

    def __init__(self, weight: Tensor | PackedWeight, block_size: int, metric: str) -> None:
        self.weight = weight.detach() if isinstance(weight, Tensor) else weight
        self.block_size = block_size
        self.metric = metric
        self.sums: dict[str, Tensor] = {}
        self.reached = False

    def add_gradient(self, dy_TN: Tensor, x_TK: Tensor) -> None:
        for name in _summed(self.metric):
            reduction = _GRADIENT[name]
            self._add(name, ops.block_score_fused(dy_TN, x_TK, self.block_size, reduction))

    def add_input(self, x_TK: Tensor) -> None:
        """Sum over tokens of |x| (activation) or x^2 (wanda), and the number of tokens; (K + 1,)."""
        x = x_TK.float()
        column = x.abs().sum(0) if self.metric == "activation" else x.square().sum(0)
        self._add(self.metric, torch.cat([column, column.new_tensor([float(len(x))])]))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value
        self.reached = True

    def finite(self) -> Tensor | None:
        """Whether all sums so far are, as a 0-dim tensor on their device; None without any."""
        flags = [total.isfinite().all() for total in self.sums.values()]
        return torch.stack(flags).all() if flags else None

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C) of the weight."""
        n, k = self.weight.shape
        return -(-n // self.block_size), -(-k // self.block_size)

    def sum(self, name: str) -> Tensor:
        """What was summed so far, zeros if no batch has reached the layer; float64."""
        if name in self.sums:
            return self.sums[name]
        shape = self.grid if name in _GRADIENT else (self.weight.shape[1] + 1,)
        return torch.zeros(shape, dtype=torch.float64, device=self.weight.device)

    def finish(self, name: str, total: Tensor, num_batches: int) -> np.ndarray:
        """(R, C) of what :meth:`sum` names, float64, from the sum over all batches of all ranks."""
        size = self.block_size
        k = self.weight.shape[1]
        grid = self.grid
        if name in _GRADIENT:
            return (total / num_batches).abs().cpu().numpy()
        # A layer without tokens (an expert that no batch has reached) scores zero.
        column = total[:-1] / total[-1].clamp(min=1.0)
        if name == "activation":
            per_block = (
                F.pad(column, (0, grid[1] * size - k)).view(grid[1], size).sum(1).cpu().numpy()
            )
            width = np.minimum(size, k - size * np.arange(grid[1]))
            return np.broadcast_to(per_block / width, grid).copy()
        weight = (
            self.weight.float() if isinstance(self.weight, Tensor) else self.weight.dequantize()
        )
        scaled = weight * column.sqrt().float()
        return ops.block_score(scaled, size).double().cpu().numpy()


def _summed(metric: str) -> tuple[str, ...]:
    """What is summed over batches for a metric: its own score, and the statistic beside it."""
    if metric in _FORWARD or metric == _STATISTIC:
        return (metric,)
    return (metric, _STATISTIC) if metric in _GRADIENT else (_STATISTIC,)


class _ScoreFunction(torch.autograd.Function):
    """F.linear whose backward scores the weight's blocks. ``anchor`` makes autograd start here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, score: _LayerScore
    ) -> Tensor:
        compute_dtype = autocast_dtype(x)
        ctx.save_for_backward(x.to(compute_dtype), weight)
        ctx.x_dtype = x.dtype
        ctx.score = score
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        ctx.score.add_gradient(dy_TN, x.reshape(-1, x.shape[-1]))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TN @ weight.to(dy.dtype)).view(x.shape).to(ctx.x_dtype)
        return dx, None, _bias_gradient(dy_TN, ctx.needs_input_grad[2]), None, None


class _ScoreQuantizedFunction(torch.autograd.Function):
    """:class:`_ScoreFunction` of a packed weight, dequantised where it is multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        score: _LayerScore,
        scheme: Scheme,
        *packed: Tensor,
    ) -> Tensor:
        dtype = autocast_dtype(x)
        ctx.save_for_backward(x.to(dtype), *packed)
        ctx.x_dtype = x.dtype
        ctx.score, ctx.scheme = score, scheme
        return F.linear(x, scheme.dequantize(packed, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *packed = ctx.saved_tensors
        dy_TN = dy.reshape(-1, dy.shape[-1])
        ctx.score.add_gradient(dy_TN, x.reshape(-1, x.shape[-1]))
        dx = None
        if ctx.needs_input_grad[0]:
            weight = ctx.scheme.dequantize(tuple(packed), dy.dtype)
            dx = (dy_TN @ weight).view(x.shape).to(ctx.x_dtype)
        bias = _bias_gradient(dy_TN, ctx.needs_input_grad[1])
        return dx, bias, *(None,) * (3 + len(packed))


def _bias_gradient(dy_TN: Tensor, needed: bool) -> Tensor | None:
    """Of a bias that trains beside the blocks."""
    return dy_TN.sum(0, dtype=torch.promote_types(dy_TN.dtype, torch.float32)) if needed else None


class _ScoredLayer(nn.Module):
    """A linear layer while it is being scored; by class swap, like SMTLayer."""

    weight: Tensor
    bias: nn.Parameter  # or None, as in nn.Linear
    _score: _LayerScore
    _anchor: Tensor
    _trace: Callable[[Tensor], None]

    @property
    def weight_NK(self) -> Tensor:
        raise NotImplementedError

    def _multiply(self, x: Tensor, input: Tensor) -> Tensor:
        self._trace(input)
        if self._score.metric in _FORWARD:
            self._score.add_input(x.detach().reshape(-1, x.shape[-1]))
            return F.linear(x, self.weight_NK, self.bias)
        out: Tensor = _ScoreFunction.apply(x, self.weight_NK, self.bias, self._anchor, self._score)
        return out


class _ExpertsScore:
    """The scores of all experts of a layer, one under the other; see :class:`GroupedUse`."""

    def __init__(self, weight_ENK: Tensor, block_size: int, metric: str) -> None:
        self.experts = [_LayerScore(weight, block_size, metric) for weight in weight_ENK]
        self.metric = metric

    @property
    def reached(self) -> bool:
        return any(expert.reached for expert in self.experts)

    @reached.setter
    def reached(self, value: bool) -> None:
        for expert in self.experts:
            expert.reached = value

    def keep(self, x_TK: Tensor, tokens: TokensByExpert) -> Sequence[Tensor]:
        return (x_TK,)

    def gradient(self, dy_TN: Tensor, kept: Sequence[Tensor], tokens: TokensByExpert) -> None:
        (x_TK,) = kept
        for expert, (start, end) in zip(self.experts, tokens.stretches, strict=True):
            if start < end:
                expert.add_gradient(dy_TN[start:end], x_TK[start:end])

    def add_input(self, x_TK: Tensor, tokens: TokensByExpert) -> None:
        for expert, (start, end) in zip(self.experts, tokens.stretches, strict=True):
            if start < end:
                expert.add_input(x_TK[start:end])

    def finite(self) -> Tensor | None:
        flags = [flag for expert in self.experts if (flag := expert.finite()) is not None]
        return torch.stack(flags).all() if flags else None

    def sum(self, name: str) -> Tensor:
        return torch.stack([expert.sum(name) for expert in self.experts])

    def finish(self, name: str, total: Tensor, num_batches: int) -> np.ndarray:
        scored = zip(self.experts, total, strict=True)
        return np.concatenate([expert.finish(name, part, num_batches) for expert, part in scored])


class _ScoredExperts(ExpertsForward):
    """An experts module while it is being scored."""

    _scores: dict[str, _ExpertsScore]
    _anchor: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._grouped_forward(hidden_states, top_k_index, top_k_weights)

    def _use_of(self, parameter: str) -> tuple[Tensor | None, _ExpertsScore | None]:
        score = self._scores.get(parameter)
        return (None, None) if score is None else (self._anchor, score)

    def _multiply(self, parameter: str, x_TK: Tensor, tokens: TokensByExpert) -> Tensor:
        score = self._scores.get(parameter)
        if score is not None and score.metric in _FORWARD:
            score.add_input(x_TK.detach(), tokens)
        return super()._multiply(parameter, x_TK, tokens)


class _ScoredLinear(LinearLayout, _ScoredLayer, nn.Linear):
    pass


class _ScoredConv1D(Conv1DLayout, _ScoredLayer):
    pass


class _ScoredQuantized(QuantizedLayout, _ScoredLayer):
    def _multiply_packed(self, x: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        self._trace(input)
        if self._score.metric in _FORWARD:
            self._score.add_input(x.detach().reshape(-1, x.shape[-1]))
            return F.linear(x, self.packed.dequantize(autocast_dtype(x)), bias)
        packed = self.packed
        out: Tensor = _ScoreQuantizedFunction.apply(
            x, bias, self._anchor, self._score, packed.scheme, *packed.tensors
        )
        return out


_Score: TypeAlias = _LayerScore | _ExpertsScore


@dataclass(frozen=True)
class ScoredModel:
    """Scores by module name, and what was learnt on the way.

    Attributes:
        scores: module name -> Scores.
        input_groups: modules that read the same tensor in the first batch.
        num_batches: batches seen.
        loss: mean over batches; None where no backward ran (no batches, or a forward metric).
        gradient: module name -> (R, C) mean |gradient| of each block; None likewise.
        beside: parameter name -> mean |gradient| of each parameter asked for; None likewise.
    """

    scores: dict[str, Scores]
    input_groups: tuple[tuple[str, ...], ...] = ()
    num_batches: int = 0
    loss: float | None = None
    gradient: dict[str, np.ndarray] | None = None
    beside: dict[str, float] | None = None


def score_blocks(
    model: nn.Module,
    targets: Mapping[str, Matrix],
    batches: Iterable[Any] | None,
    *,
    block_size: int,
    metric: str = "mean_abs",
    loss_fn: LossFn | None = None,
    num_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
    distributed: bool = False,
    unit: Unit = "block",
    beside: Mapping[str, nn.Parameter] | None = None,
) -> ScoredModel:
    """Score every block of the target weights; the arguments are those of make_plan.

    Args:
        beside: small parameters whose mean |gradient| is taken too.
    """
    if metric not in METRICS:
        raise PlanError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if not ops.MIN_BLOCK_SIZE <= block_size <= ops.MAX_BLOCK_SIZE:
        raise PlanError(
            f"block_size is {block_size}, expected {ops.MIN_BLOCK_SIZE} to {ops.MAX_BLOCK_SIZE}"
        )
    for name, target in targets.items():
        check_block_size(name, target, block_size)
    shapes = {name: shape_NK(m) for name, m in targets.items()}
    values: dict[str, np.ndarray] = {}
    if metric == "random":
        values = {n: _random_grid(n, s, block_size, seed, unit) for n, s in shapes.items()}
    elif metric == "weight":
        values = {
            n: ops.block_score(weight_NK(m).detach(), block_size).double().cpu().numpy()
            for n, m in targets.items()
        }
    if batches is None:
        if not values:
            raise PlanError(
                f"metric {metric!r} needs batches: pass a few batches of the training data, or use "
                "metric='weight' or 'random'"
            )
        return ScoredModel({n: Scores(shapes[n], block_size, v) for n, v in values.items()})
    layers: dict[str, _Score] = {
        name: _ExpertsScore(target.weight, block_size, metric)
        if isinstance(target, ExpertMatrix)
        else _LayerScore(packed_weight(target) or weight_NK(target), block_size, metric)
        for name, target in targets.items()
    }
    groups: list[list[str]] = []
    beside = beside or {}
    sums_beside = {
        n: torch.zeros((), dtype=torch.float64, device=p.device) for n, p in beside.items()
    }
    distributed = distributed and ranks.world_size() > 1
    show = progress and (ranks.is_main() or not distributed)
    error: Exception | None = None
    losses: list[float] = []
    try:
        losses = _run(
            model, batches, targets, layers, groups, loss_fn, num_batches,
            beside=[(p, sums_beside[n]) for n, p in beside.items()], progress=show,
        )  # fmt: skip
    except Exception as raised:
        if not distributed:
            raise
        error = raised
    names = [(of, name) for of in _summed(metric) for name in layers]
    totals = [layers[name].sum(of) for of, name in names] + list(sums_beside.values())
    seen = len(losses)
    if distributed:
        ranks.raise_together(error, PlanError)
        found = ranks.gather_objects((metric, block_size, shapes, list(beside), groups, losses))
        if len({repr(settings) for *settings, _, _ in found}) > 1:
            raise PlanError(
                "the ranks plan with different metrics, block sizes or target modules. Call make_plan "
                "with the same arguments on every rank, or with distributed=False on one."
            )
        losses = [loss for *_, of_rank in found for loss in of_rank]
        seen = len(losses)
        groups = next((rank_groups for *_, rank_groups, of_rank in found if of_rank), [])
        totals = ranks.sum_over_ranks(totals)
    if seen == 0:
        raise DataError("planning saw no batch: batches is empty")
    finished = {
        (of, name): layers[name].finish(of, total, seen)
        for (of, name), total in zip(names, totals[: len(names)], strict=True)
    }
    means_beside = {
        name: float(total) / (seen * parameter.numel())
        for (name, parameter), total in zip(beside.items(), totals[len(names) :], strict=True)
    }
    if bad := next((name for name, mean in means_beside.items() if not math.isfinite(mean)), None):
        raise PlanError(f"the gradient of {bad!r} is inf or NaN: leave it out of also_train.")
    ran_backward = metric not in _FORWARD
    if ran_backward:
        dead = [
            name for name, target in targets.items()
            if not isinstance(target, ExpertMatrix) and not finished[_STATISTIC, name].any()
        ]  # fmt: skip
        if dead and len(dead) == len(targets):
            raise PlanError(
                f"every gradient of all {len(targets)} targets is 0 in {seen} batches. Look at the loss:"
                " it may not depend on them, or underflow the model's dtype."
            )
        if dead:
            logger.warning(
                "no gradient reached %d of %d targets (first: %r): something reads their weights past "
                "the modules, as a fused loss does with the output head. They would not train, and are "
                "left out.",
                len(dead), len(targets), dead[0],
            )  # fmt: skip
            layers = {name: layer for name, layer in layers.items() if name not in dead}
    return ScoredModel(
        scores={
            name: Scores(
                shapes[name], block_size, values[name] if values else finished[metric, name]
            )
            for name in layers
        },
        input_groups=tuple(tuple(group) for group in groups if len(group) > 1),
        num_batches=seen,
        loss=math.fsum(losses) / seen if ran_backward else None,
        gradient={n: finished[_STATISTIC, n] for n in layers} if ran_backward else None,
        beside=means_beside if ran_backward else None,
    )


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Mapping[str, Matrix],
    layers: Mapping[str, _Score],
    groups: list[list[str]],
    loss_fn: LossFn | None,
    num_batches: int | None,
    *,
    beside: Sequence[tuple[nn.Parameter, Tensor]],
    progress: bool,
) -> list[float]:
    """Score this process's batches; returns the loss of each, NaN where only forward ran."""
    losses = []
    metric = next(iter(layers.values())).metric
    counts = [num_batches, len(batches) if isinstance(batches, Sized) else None]
    expected = min((count for count in counts if count is not None), default=None)
    with (
        no_repacking(model),
        _scoring(model, targets, layers, groups) as anchor,
        _gradients_of(beside if metric not in _FORWARD else ()),
    ):
        for index, batch in enumerate(
            tqdm(islice(batches, num_batches), "planning", total=expected, disable=not progress)
        ):
            _check_batch(index, batch)
            if metric in _FORWARD:
                with torch.no_grad():
                    _loss_or_output(model, batch, loss_fn)
                losses.append(math.nan)
            else:
                losses.append(_backward(model, batch, index, loss_fn, anchor))
                _check_reached(index, layers)
    return losses


@contextmanager
def _scoring(
    model: nn.Module,
    targets: Mapping[str, Matrix],
    layers: Mapping[str, _Score],
    groups: list[list[str]],
) -> Iterator[Tensor]:
    """Swap the target layers in, freeze every parameter; put everything back at the end."""
    required_grad = [p for p in model.parameters() if p.requires_grad]
    # What forward changes in training: running means and variances, averages.
    statistics = [
        (owner, name, getattr(owner, name), getattr(owner, name).clone())
        for _, owner, name in persistent_buffers(model)
    ]
    weight = next(iter(targets.values())).weight
    assert isinstance(weight, Tensor)
    anchor = torch.zeros((), device=weight.device, requires_grad=True)
    readers: WeakIdKeyDictionary = WeakIdKeyDictionary()
    swapped: list[nn.Module] = []
    hook = None
    try:
        for parameter in required_grad:
            parameter.requires_grad_(False)
        for name, target in targets.items():
            if isinstance(target, ExpertMatrix):
                module = target.experts
                if module not in swapped:
                    swap_class_(module, combined_class(_ScoredExperts, type(module)))
                    swapped.append(module)
                module.__dict__.setdefault("_scores", {})[target.parameter] = layers[name]
            else:
                module = target
                swap_class_(module, _scored_class(module))
                swapped.append(module)
                module.__dict__["_score"] = layers[name]
                module.__dict__["_trace"] = _tracer(name, readers, groups)
            module.__dict__["_anchor"] = anchor
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            # Reentrant checkpointing records a graph only for inputs that require gradients.
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            hook = embeddings.register_forward_hook(lambda m, args, out: out.requires_grad_(True))
        yield anchor
    finally:
        if hook is not None:
            hook.remove()
        for module in swapped:
            restore_class_(module)
            for attribute in ("_score", "_scores", "_anchor", "_trace"):
                module.__dict__.pop(attribute, None)
        for parameter in required_grad:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for owner, name, buffer, before in statistics:
                owner._buffers[name] = buffer  # forward may have put another in its place
                buffer.copy_(before)


@contextmanager
def _gradients_of(beside: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Let parameters have gradients, of which the sum of |.| is added to their sums at once."""

    def adder(total: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad.abs().sum(dtype=torch.float64))
            parameter.grad = None

        return add

    before = [parameter.grad for parameter, _ in beside]
    hooks = []
    try:
        for parameter, total in beside:
            parameter.grad = None
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(adder(total)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (parameter, _), grad in zip(beside, before, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = grad


def _scored_class(module: nn.Module) -> type[nn.Module]:
    if packed_weight(module) is not None:
        return with_layout(_ScoredQuantized, type(module))
    return _ScoredConv1D if is_conv1d(module) else _ScoredLinear


def _tracer(
    name: str, readers: WeakIdKeyDictionary, groups: list[list[str]]
) -> Callable[[Tensor], None]:
    """Notes, on the layer's first forward, who else has read the very same tensor."""
    done = False

    def trace(x: Tensor) -> None:
        nonlocal done
        if done:
            return
        done = True
        group = readers.get(x)
        if group is None:
            group = []
            readers[x] = group
            groups.append(group)
        group.append(name)

    return trace


def _loss_or_output(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Any:
    if loss_fn is not None:
        return loss_fn(model, batch)
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**moved)
    if isinstance(batch, (tuple, list)):
        return model(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))
    return model(batch.to(device) if isinstance(batch, Tensor) else batch)


def _backward(
    model: nn.Module, batch: Any, index: int, loss_fn: LossFn | None, anchor: Tensor
) -> float:
    with torch.enable_grad():
        out = _loss_or_output(model, batch, loss_fn)
        loss = out if loss_fn is not None else getattr(out, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise PlanError(
                f"batch {index} gave no scalar loss (got {type(loss).__name__}). Put 'labels' into "
                "the batch for a Hugging Face model, or pass loss_fn(model, batch) -> loss."
            )
        if not math.isfinite(value := float(loss.detach())):
            raise PlanError(
                f"batch {index} gave the loss {value}. Look at that batch's labels, and at the "
                "model's dtype (float16 overflows easily; use bfloat16 or float32)."
            )
        if not loss.requires_grad:
            raise PlanError(
                f"the loss of batch {index} does not depend on any target module. Check the targets, "
                "and that loss_fn does not run under torch.no_grad()."
            )
        with torch.autocast(anchor.device.type, enabled=False):
            loss.backward()
        return value


def _check_batch(index: int, batch: Any) -> None:
    tensors = batch.values() if isinstance(batch, Mapping) else batch
    tensors = (
        tensors if isinstance(tensors, Iterable) and not isinstance(batch, Tensor) else [batch]
    )
    if any(isinstance(t, Tensor) and t.numel() == 0 for t in tensors):
        raise DataError(f"batch {index} is empty: it holds a tensor without elements")
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and bool((labels == -100).all()):
        raise DataError(
            f"batch {index} has no label to learn from: all are masked (-100). Check the prompt "
            "masking, and that answers are not cut off."
        )


def _check_reached(index: int, layers: Mapping[str, _Score]) -> None:
    if not any(layer.reached for layer in layers.values()):
        raise PlanError(
            f"no gradient reached a target module in batch {index}. With reentrant gradient "
            "checkpointing call model.enable_input_require_grads(), or use_reentrant=False."
        )
    flags = {n: flag for n, layer in layers.items() if (flag := layer.finite()) is not None}
    device = next(iter(flags.values())).device
    finite = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    # One wait for the device, not one a layer.
    for name, is_finite in zip(flags, finite, strict=True):
        if not is_finite:
            raise PlanError(
                f"the gradient of {name!r} is inf or NaN in batch {index}. Look at that batch, and "
                "at the model's dtype (float16 overflows easily; use bfloat16 or float32)."
            )
    for layer in layers.values():
        layer.reached = False


def _random_grid(
    name: str, shape: tuple[int, int], block_size: int, seed: int, unit: Unit
) -> np.ndarray:
    """Uniform scores from (seed, name) alone: the same on every machine and version.

    Blocks of a unit share one draw: the mean of several would favour units of few blocks.
    """
    rows, cols = (-(-s // block_size) for s in shape)
    draw = random.Random(f"{seed}/{name}")
    if unit == "block":
        return np.array([[draw.random() for _ in range(cols)] for _ in range(rows)])
    of_unit = np.array([draw.random() for _ in range(cols if unit == "column" else rows)])
    return np.broadcast_to(of_unit if unit == "column" else of_unit[:, None], (rows, cols)).copy()
