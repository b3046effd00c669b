"""What fine-tuning will need in memory, before a GPU is bought or a weight is downloaded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from .._extras import require
from ..errors import DataError
from ..hf.loading import checkpoint_activations
from ..layouts import weight_NK
from ..nn.patching import patch_meta, status
from ..plan import BlockPlan
from ..planning.make_plan import DEFAULT_TARGETS
from ..planning.targets import select_targets
from .assumed_plan import Columns, Spread, assumed_plan, describe
from .meta_model import meta_model, model_config
from .shape_cache import ShapeCache
from .trace import Trace, trace_step

__all__ = ["METHODS", "Estimate", "MethodEstimate", "estimate", "parse_bytes"]

METHODS = ("full", "full-master", "lora", "dora", "smt")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TITLES = {
    "full": "full",
    "full-master": "full, fp32 master",
    "lora": "LoRA",
    "dora": "DoRA",
    "smt": "SMT",
}


@dataclass(frozen=True)
class MethodEstimate:
    """One way to fine-tune, in bytes.

    Attributes:
        method: one of METHODS. title: as shown; settings: rank, blocks, ...
        trainable: parameters that train. percent: of the base model's.
        weights: all parameters and buffers, adapters and trained blocks included.
        gradients: all gradients, at the end of backward.
        optimizer: Adam's two moments, and float32 master weights where the optimizer holds them.
        saved: kind of layer -> bytes kept for backward at the end of forward.
        peak: the highest moment of a step: ``sum(at_peak.values())``.
        at_peak: weights, optimizer, gradients, saved and working bytes at that moment.
            ``working`` is all else: logits and their gradients, a weight gradient that is being
            summed, activations that are recomputed, what an operator has just returned.
        peak_in_backward: whether that moment comes in backward.
        largest_batch: the largest batch whose peak fits into the memory given; 0 if none does.
    """

    method: str
    title: str
    settings: str
    trainable: int
    percent: float
    weights: int
    gradients: int
    optimizer: int
    saved: Mapping[str, int]
    peak: int
    at_peak: Mapping[str, int]
    peak_in_backward: bool
    largest_batch: int | None = None

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for backward in all."""
        return sum(self.saved.values())


@dataclass(frozen=True)
class Estimate:
    """Estimates side by side; ``str()`` gives a table, :meth:`to_json` everything in bytes."""

    model: str
    parameters: int
    batch: int
    length: int
    dtype: str
    gradient_checkpointing: bool
    plan: str
    memory: int | None
    methods: tuple[MethodEstimate, ...]

    def __getitem__(self, method: str) -> MethodEstimate:
        return next(entry for entry in self.methods if entry.method == method)

    def to_json(self) -> str:
        """All fields as JSON; sizes in bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        return _table(self)


def estimate(
    model: str | os.PathLike[str] | Any,
    *,
    batch: int = 1,
    length: int = 2048,
    answers: int | None = None,
    padded: bool = False,
    dtype: torch.dtype | str = torch.bfloat16,
    budget: str | float = "0.84%",
    block_size: int = 256,
    targets: str | Iterable[str] = DEFAULT_TARGETS,
    plan: BlockPlan | None = None,
    spread: Spread = "paper",
    columns: Columns = "distinct",
    methods: Sequence[str] | None = None,
    rank: int | None = None,
    gradient_checkpointing: bool = False,
    memory: int | str | None = None,
) -> Estimate:
    """Memory of full fine-tuning, LoRA, DoRA and SMT, from shapes alone.

    The model is built on the meta device and runs forward and backward there, patched by smt_ext or
    by PEFT as it would be for training. No formula per architecture: what each method keeps is
    what its own code saves. Counted is what torch's allocator would hand out: not the CUDA context
    (about half a gigabyte), not fragmentation, not working memory inside a kernel.

    What is assumed:

    - one device
    - attention by a flash kernel (torch's ``scaled_dot_product_attention``)
    - AdamW with fused updates, which allocates nothing; moments in the dtype of what trains:
      ``full`` in ``dtype`` (weights of bfloat16 have moments of bfloat16), ``full-master`` in float32
      with a float32 copy of the weights, adapters in float32 as PEFT makes them, SMT blocks in
      float32
    - gradients are freed after each step
    - LoRA and DoRA on all linear layers but the output head, without dropout

    Args:
        model: ``llama-7b``, ``llama-13b``, ``llama-3-8b``, a folder with config.json, a hub name, a
            .gguf file, or a transformers configuration.
        batch, length: sequences of a step, and tokens of each.
        answers: tokens of the batch that the loss is taken on, with the head computed for these alone
            as ``smt-ext train`` does. Default: the model's own loss, on all tokens.
        padded: the batch has padding (or packed sequences), so that attention takes a mask, and its
            keys and values are repeated for grouped-query attention.
        dtype: of the weights: torch dtype, ``bf16``, ``fp16`` or ``fp32``.
        budget, block_size, targets: of SMT, as in :func:`smt_ext.make_plan`.
        plan: a real plan instead of an assumed one.
        spread, columns: how the budget is assumed to fall, see
            :func:`smt_ext.estimation.assumed_plan.assumed_plan`.
        methods: some of METHODS; default all, LoRA and DoRA where PEFT is installed.
        rank: of LoRA and DoRA; default the one that trains about as many parameters as SMT.
        gradient_checkpointing: recompute each layer in backward.
        memory: bytes, or text such as ``24GB`` (decimal) or ``24GiB``, to find the largest batch for.

    Raises:
        DataError: an argument out of range, or a model that cannot be run without values.
        PlanError: a plan that does not fit, or as in make_plan.
    """
    config = model_config(model)
    dtype = _dtype(dtype)
    _check_shape(config, batch, length, answers)
    chosen = _methods(methods)
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    base = meta_model(config, dtype)
    parameters = sum(p.numel() for p in base.parameters())
    if plan is None:
        plan = assumed_plan(base, budget=budget, block_size=block_size, targets=targets,
                            spread=spread, columns=columns)  # fmt: skip
        described = describe(spread, columns)
    else:
        plan.validate(base)
        described = f"the plan given, {plan.num_blocks:,} blocks"
    prepare = _Prepare(plan, rank)
    shapes = ShapeCache()

    def run(method: str) -> MethodEstimate:
        subject = meta_model(config, dtype, padded=padded)
        if gradient_checkpointing:
            checkpoint_activations(subject)
        with shapes:
            subject, settings, optimizer = prepare(method, subject)
        held = {t.untyped_storage()._cdata: t for t in (*subject.parameters(), *subject.buffers())}
        weights = sum(tensor.untyped_storage().nbytes() for tensor in held.values())

        def step(rows: int) -> Trace:
            return trace_step(
                subject, rows, length, None if answers is None else rows * answers // batch, shapes
            )

        trace = step(batch)
        fits = None
        if limit is not None:
            fits = _largest_batch(trace, step, batch, limit - weights - optimizer)
        trainable = plan.num_parameters if method == "smt" else _trainable(subject)
        return MethodEstimate(
            method=method,
            title=_TITLES[method],
            settings=settings,
            trainable=trainable,
            percent=100 * trainable / parameters,
            weights=weights,
            gradients=trace.gradients,
            optimizer=optimizer,
            saved=trace.saved,
            peak=weights + optimizer + trace.peak,
            at_peak={"weights": weights, "optimizer": optimizer, **trace.at_peak},
            peak_in_backward=trace.peak_in_backward,
            largest_batch=fits,
        )

    return Estimate(
        model=model if isinstance(model, str) else str(config.model_type),
        parameters=parameters,
        batch=batch,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        gradient_checkpointing=gradient_checkpointing,
        plan=described,
        memory=limit,
        methods=tuple(run(method) for method in chosen),
    )


def parse_bytes(text: str) -> int:
    """Bytes from text such as ``24GB`` (24 x 10^9), ``24GiB`` (24 x 2^30) or ``24G``.

    Raises:
        DataError: neither. A number without a unit is none: who writes 24 does not mean bytes.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]) or not (match[2] or match[4]):
        raise DataError(
            f"memory is {text!r}, expected a number with its unit, such as 24GB, 24GiB or 80GB"
        )
    unit = match[2].upper()
    return int(float(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))


class _Prepare:
    """Makes a fresh model ready for a method; gives settings in words and bytes of the optimizer."""

    def __init__(self, plan: BlockPlan, rank: int | None) -> None:
        self.plan = plan
        self.rank = rank

    def __call__(self, method: str, model: nn.Module) -> tuple[nn.Module, str, int]:
        if method == "smt":
            patch_meta(model, self.plan)
            what = status(model)
            columns = f"{what.saved_bytes_per_token:,} bytes of input columns a token"
            blocks = f"{self.plan.num_blocks:,} blocks, {columns}"
            return model, blocks, what.moment_bytes
        if method in ("lora", "dora"):
            return self._adapters(model, dora=method == "dora")
        model.requires_grad_(True)
        if method == "full-master":
            # The master copy and both moments in float32.
            return model, "AdamW in float32", 3 * 4 * _trainable(model)
        return model, "AdamW in the weights' dtype", _moments(model)

    def _adapters(self, model: nn.Module, *, dora: bool) -> tuple[nn.Module, str, int]:
        with _quiet("bitsandbytes"):
            from peft import LoraConfig, get_peft_model

        # PEFT adapts modules; experts in one parameter stay as they are.
        linears = {
            name: matrix
            for name, matrix in select_targets(model, "all-linear").items()
            if isinstance(matrix, nn.Module)
        }
        per_rank = sum(sum(weight_NK(m).shape) for m in linears.values())
        rank = self.rank or max(1, round(self.plan.num_parameters / per_rank))
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=list(linears)
        )
        with warnings.catch_warnings():
            # PEFT uses what transformers has deprecated; nothing that a user of estimates can change.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        return adapted, f"r = {rank}, all linear layers", _moments(adapted)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of a library that is imported on the way and not used.

    PEFT imports bitsandbytes where it is installed, which tells of kernels it could have on CPUs.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _moments(model: nn.Module) -> int:
    """Bytes of the two moments that torch.optim.AdamW makes like each parameter."""
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _largest_batch(first: Trace, step: Callable[[int], Trace], batch: int, left: int) -> int:
    """The largest batch whose highest level stays within ``left`` bytes.

    The size of every storage is affine in the batch, hence so is every level of the step: two batch
    sizes tell the levels of all others.
    """
    second = step(2 * batch)
    if second.events != first.events:
        # A batch of one may take other operations than the rest.
        batch *= 2
        first, second = second, step(2 * batch)
    if second.events != first.events:
        raise DataError(
            "the model takes other operations for other batch sizes, so the largest batch cannot be "
            "foretold: leave the memory out, and estimate the batches of interest one by one"
        )
    growth = second.levels - first.levels
    rest = left - first.levels
    if (rest[growth <= 0] < 0).any():
        return 0
    grows = growth > 0
    return max(0, batch + int(np.min(rest[grows] * batch // growth[grows])))


def _methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    has_peft = find_spec("peft") is not None
    if methods is None:
        return tuple(m for m in METHODS if has_peft or m not in ("lora", "dora"))
    for method in methods:
        if method not in METHODS:
            raise DataError(f"method is {method!r}, expected some of {', '.join(METHODS)}")
        if method in ("lora", "dora"):
            require(f"method {method!r}", "peft")
    return tuple(methods)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise DataError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    return found


def _check_shape(config: Any, batch: int, length: int, answers: int | None) -> None:
    for name, value in (("batch", batch), ("length", length), ("answers", answers)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DataError(
            f"length is {length}, and the context of {config.model_type} is {limit} tokens"
        )


def _table(estimate: Estimate) -> str:
    kinds = sorted(
        {kind for entry in estimate.methods for kind in entry.saved},
        key=lambda kind: -max(entry.saved.get(kind, 0) for entry in estimate.methods),
    )
    rows: list[tuple[str, list[str]]] = [("", [e.title for e in estimate.methods])]

    def add(title: str, value: Callable[[MethodEstimate], str]) -> None:
        rows.append((title, [value(entry) for entry in estimate.methods]))

    add("trainable", lambda e: f"{e.percent:.2f} %")
    add("weights", lambda e: _size(e.weights))
    add("gradients", lambda e: _size(e.gradients))
    add("optimizer", lambda e: _size(e.optimizer))
    add("saved for backward", lambda e: _size(e.saved_bytes))
    for kind in kinds:
        add(f"  {kind}", lambda e, kind=kind: _size(e.saved.get(kind, 0)))  # type: ignore[misc]
    add("peak", lambda e: _size(e.peak))
    add("  gradients", lambda e: _size(e.at_peak["gradients"]))
    add("  saved", lambda e: _size(e.at_peak["saved"]))
    add("  working", lambda e: _size(e.at_peak["working"]))
    add("  comes in", lambda e: "backward" if e.peak_in_backward else "forward")
    hints = []
    if estimate.memory is not None:
        if 0 in [entry.largest_batch for entry in estimate.methods]:
            hints.append("largest batch 0: not even one sequence fits; try shorter ones")
            if not estimate.gradient_checkpointing:
                hints[-1] += ", or gradient checkpointing"
        add(f"largest batch in {_size(estimate.memory)}", lambda e: f"{e.largest_batch:,}")
    label = max(len(title) for title, _ in rows)
    widths = [max(9, *(len(cells[i]) for _, cells in rows)) for i in range(len(estimate.methods))]
    lines = [
        f"{estimate.model}: {estimate.parameters:,} parameters, {estimate.batch} x "
        f"{estimate.length:,} tokens, {estimate.dtype}"
        + (", gradient checkpointing" if estimate.gradient_checkpointing else ""),
        *(
            (f"{title:<{label}}  " + "  ".join(map(str.rjust, cells, widths))).rstrip()
            for title, cells in rows
        ),
        *(f"{entry.title}: {entry.settings}" for entry in estimate.methods),
        *hints,
        f"SMT blocks {estimate.plan}",
        "sizes in 10^9 bytes, as torch's allocator counts; not the CUDA context, not fragmentation",
    ]
    return "\n".join(lines)


def _size(value: int) -> str:
    return f"{value / 1e9:.3f}" if value < 1e9 else f"{value / 1e9:.2f}"
