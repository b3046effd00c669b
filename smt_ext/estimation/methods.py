"""Models on the meta device made ready for each way to fine-tune."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layouts import weight_NK
from ..nn.patching import patch_meta, status
from ..plan import BlockPlan
from ..planning.targets import select_targets
from .meta_model import quantize_meta_

__all__ = ["METHODS", "prepare"]

# Method -> its title.
METHODS = {
    "full": "full",
    "full-master": "full, fp32 master",
    "lora": "LoRA",
    "dora": "DoRA",
    "smt": "SMT",
    "qlora": "QLoRA",
    "smt-4bit": "SMT, 4-bit",
}


def prepare(
    method: str, model: nn.Module, plan: BlockPlan, rank: int | None
) -> tuple[nn.Module, str, int]:
    """The model as it trains, settings in words, and bytes that the optimizer will hold."""
    with _quiet("bitsandbytes"):
        if method in ("qlora", "smt-4bit"):
            quantize_meta_(model)
        if method in ("lora", "dora", "qlora"):
            return _adapters(model, plan, rank, dora=method == "dora")
    if method.startswith("smt"):
        patch_meta(model, plan)
        what = status(model)
        columns = f"{what.saved_bytes_per_token:,} bytes of input columns a token"
        return model, f"{plan.num_blocks:,} blocks, {columns}", what.moment_bytes
    model.requires_grad_(True)
    if method == "full-master":
        # The master copy and both moments in float32.
        master = 3 * 4 * sum(p.numel() for p in model.parameters())
        return model, "AdamW in float32", master
    return model, "AdamW in the weights' dtype", _moments(model)


def _adapters(
    model: nn.Module, plan: BlockPlan, rank: int | None, *, dora: bool
) -> tuple[nn.Module, str, int]:
    from peft import LoraConfig, get_peft_model

    # PEFT adapts modules; experts in one parameter stay as they are.
    linears = {
        name: matrix
        for name, matrix in select_targets(model, "all-linear").items()
        if isinstance(matrix, nn.Module)
    }
    per_rank = sum(sum(weight_NK(matrix).shape) for matrix in linears.values())
    rank = rank or max(1, round(plan.num_parameters / per_rank))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=list(linears))
    with warnings.catch_warnings():
        # PEFT uses what transformers has deprecated; nothing that a user of estimates can change.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return adapted, f"r = {rank}, all linear layers", _moments(adapted)


def _moments(model: nn.Module) -> int:
    """Bytes of the two moments that torch.optim.AdamW makes like each parameter."""
    return sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of a library that tells of kernels it could have on CPUs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
