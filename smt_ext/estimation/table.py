"""What fine-tuning will need in memory, before a GPU is bought or a weight is downloaded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from .._extras import require
from ..errors import DataError
from ..hf.loading import checkpoint_activations
from ..memory import held_tensors
from ..plan import BlockPlan
from ..planning.make_plan import make_plan
from .meta_model import METHODS, meta_model, model_config, prepare
from .trace import Trace, no_collection, trace_step

__all__ = ["Estimate", "MethodEstimate", "estimate", "parse_bytes"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Method -> packages that it cannot be traced without.
_PACKAGES = {
    "lora": ["peft"], "dora": ["peft"], "qlora": ["peft", "bitsandbytes"], "smt-4bit": ["bitsandbytes"],
}  # fmt: skip


@dataclass(frozen=True)
class MethodEstimate:
    """One way to fine-tune; sizes in bytes.

    Attributes:
        trainable: parameters that train. percent: of the base model's.
        weights: all parameters and buffers, adapters, trained blocks and scales included.
        gradients: all gradients, at the end of backward.
        optimizer: Adam's two moments, and float32 master weights where the optimizer holds them.
        saved: kind of layer -> bytes kept for backward at the end of forward.
        peak: the highest moment of a step.
        at_peak: what it consists of: weights, optimizer, gradients, saved and working bytes.
            ``working`` is all else: logits and their gradients, a dequantised weight, activations that
            are recomputed, what an operator has just returned.
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
        entries = self.methods
        kinds = sorted(
            dict.fromkeys(kind for e in entries for kind in e.saved),
            key=lambda kind: -max(e.saved.get(kind, 0) for e in entries),
        )
        sizes = {
            "weights": [e.weights for e in entries],
            "gradients": [e.gradients for e in entries],
            "optimizer": [e.optimizer for e in entries],
            "saved for backward": [e.saved_bytes for e in entries],
            **{f"  {kind}": [e.saved.get(kind, 0) for e in entries] for kind in kinds},
            "peak": [e.peak for e in entries],
            **{
                f"  {p}": [e.at_peak[p] for e in entries] for p in ("gradients", "saved", "working")
            },
        }
        rows = [
            ["", *(e.title for e in entries)],
            ["trainable", *(f"{e.percent:.2f} %" for e in entries)],
            *([label, *map(_size, values)] for label, values in sizes.items()),
        ]
        lines = [f"{e.title}: {e.settings}" for e in entries]
        if self.memory is not None:
            largest = [f"{e.largest_batch:,}" for e in entries]
            rows.append([f"largest batch in {_size(self.memory)}", *largest])
            if "0" in largest:
                more = "" if self.gradient_checkpointing else ", or gradient checkpointing"
                lines.append(f"largest batch 0: not even one sequence fits; try shorter ones{more}")
        title = (
            f"{self.model}: {self.parameters:,} parameters, {self.batch} x {self.length:,} tokens, "
            f"{self.dtype}{', gradient checkpointing' * self.gradient_checkpointing}"
        )
        lines += [
            f"plan of SMT: {self.plan}",
            "sizes in 10^9 bytes, as torch's allocator counts; not the CUDA context, not fragmentation",
        ]
        return "\n".join([title, _aligned(rows), *lines])


@no_collection()  # a tenth of the time would go into looking through what it makes
def estimate(
    model: str | os.PathLike[str] | Any,
    *,
    batch: int = 1,
    length: int = 2048,
    dtype: torch.dtype | str = torch.bfloat16,
    budget: str | float = "0.84%",
    block_size: int | None = None,
    targets: str | Iterable[str] | None = None,
    plan: BlockPlan | None = None,
    methods: Sequence[str] | None = None,
    rank: int | None = None,
    gradient_checkpointing: bool = False,
    memory: int | str | None = None,
) -> Estimate:
    """Memory of full fine-tuning, LoRA, DoRA, QLoRA, SMT, and SMT on a 4-bit base, from shapes alone.

    The model is built on the meta device and runs forward and backward there, changed by smt_ext,
    PEFT and bitsandbytes as it would be for training. No formula per architecture: what each method
    keeps is what its own code saves. Counted is what torch's allocator would hand out: not the CUDA
    context (about half a gigabyte), not fragmentation, not working memory inside a kernel.

    What is assumed stands in docs/memory.md.

    Args:
        model: ``llama-3-8b`` or another of ``smt_ext.estimation.meta_model.PRESETS``, a folder with
            config.json, a hub name, a .gguf file, or a transformers configuration.
        batch, length: sequences of a step, and tokens of each.
        dtype: of the weights: torch dtype, ``bf16``, ``fp16`` or ``fp32``.
        budget, block_size, targets: of SMT, as in :func:`smt_ext.make_plan`, of the preset
            ``recommended`` where not given: blocks at random, which needs no data.
        plan: instead of such a one.
        methods: some of METHODS; default all whose packages (PEFT, bitsandbytes) are installed.
        rank: of LoRA, DoRA and QLoRA; default the one that trains about as many parameters as SMT.
        gradient_checkpointing: recompute each layer in backward.
        memory: bytes, or text such as ``24GB`` (decimal) or ``24GiB``, to find the largest batch for.

    Raises:
        DataError: an argument out of range, or a model that cannot be run without values.
        PlanError: a plan that does not fit, or as in make_plan.
    """
    config = model_config(model)
    kind: Any = DTYPES.get(str(dtype), dtype)
    if kind not in DTYPES.values():
        raise DataError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise DataError(
            f"length is {length}, and the context of {config.model_type} is {context} tokens"
        )
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    base = meta_model(config, kind)
    parameters = sum(p.numel() for p in base.parameters())
    if plan is None:
        plan = make_plan(
            base, None, preset="recommended", budget=budget, block_size=block_size, targets=targets,
            progress=False, distributed=False,
        )  # fmt: skip
    plan.validate(base)
    traces: dict[tuple[str, int], Trace] = {}

    def run(method: str) -> MethodEstimate:
        subject = meta_model(config, kind)
        if gradient_checkpointing:
            checkpoint_activations(subject)
        subject, settings, optimizer = prepare(method, subject, plan, rank)
        storages = [tensor.untyped_storage() for tensor in held_tensors(subject)]
        weights = sum({s._cdata: s.nbytes() for s in storages}.values())
        trainable = sum(p.numel() for p in subject.parameters() if p.requires_grad)
        if method.startswith("smt"):
            trainable = plan.num_parameters  # without the padding of their blocks

        def step(rows: int) -> Trace:
            key = method.removesuffix("-master"), rows  # whose step is the same
            if key not in traces:
                traces[key] = trace_step(subject, rows, length)
            return traces[key]

        trace, held = step(batch), weights + optimizer
        return MethodEstimate(
            method=method,
            title=METHODS[method],
            settings=settings,
            trainable=trainable,
            percent=100 * trainable / parameters,
            weights=weights,
            gradients=trace.gradients,
            optimizer=optimizer,
            saved=trace.saved,
            peak=held + int(trace.levels.max()),
            at_peak={"weights": weights, "optimizer": optimizer, **trace.at_peak},
            largest_batch=None if limit is None else _largest_batch(step, batch, limit - held),
        )

    return Estimate(
        model=model if isinstance(model, str) else str(config.model_type),
        parameters=parameters,
        batch=batch,
        length=length,
        dtype=str(kind).removeprefix("torch."),
        gradient_checkpointing=gradient_checkpointing,
        plan=f"{plan.num_blocks:,} blocks, by {plan.provenance.get('metric', 'hand')}",
        memory=limit,
        methods=tuple(map(run, _methods(methods))),
    )


def parse_bytes(text: str) -> int:
    """Bytes from text such as ``24GB`` (24 x 10^9) or ``24GiB`` (24 x 2^30), as accelerate reads it.

    Raises:
        DataError: neither. A number without a unit is none: who writes 24 does not mean bytes.
    """
    accelerate: Any = import_module("accelerate.utils")
    try:
        return int(accelerate.convert_file_size_to_int(text.upper()))  # "b" would be bits to it
    except (ValueError, OverflowError):
        raise DataError(
            f"memory is {text!r}, expected a number with its unit, such as 24GB, 24GiB or 80GB"
        ) from None


def _largest_batch(step: Callable[[int], Trace], batch: int, left: int) -> int:
    """The largest batch whose highest level stays within ``left`` bytes.

    The size of every storage is affine in the batch, hence so is every level of the step: two batch
    sizes tell the levels of all others.
    """
    first, second = step(batch), step(2 * batch)
    if second.events != first.events:  # a batch of one may take other operations than the rest
        batch, first, second = 2 * batch, second, step(4 * batch)
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


def _methods(methods: Sequence[str] | None) -> Sequence[str]:
    """Those given, checked; else all whose packages are installed."""
    if methods is None:
        return [m for m in METHODS if all(map(find_spec, _PACKAGES.get(m, ())))]
    for method in methods:
        if method not in METHODS:
            raise DataError(f"method is {method!r}, expected some of {', '.join(METHODS)}")
        require(f"method {method!r}", *_PACKAGES.get(method, ()))
    return methods


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of each to the left."""
    label, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = "  ".join([f"{{:<{label}}}", *(f"{{:>{max(9, width)}}}" for width in widths)])
    return "\n".join(form.format(*row).rstrip() for row in rows)


def _size(value: int) -> str:
    return f"{value / 1e9:.3f}" if value < 1e9 else f"{value / 1e9:.2f}"
