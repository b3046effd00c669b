"""Block sets, deltas and LoRA adapters of every architecture."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel
from tiny import ARCHITECTURES

import smt_ext
from smt_ext.checkpoint.delta import apply_delta

EXPERTS = ("Mixtral", "Qwen3-MoE")


def outputs(model, architecture):
    with torch.no_grad():
        return model(**architecture.batch(9)).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_for_others_to_load(tmp_path, architecture):
    model = architecture.model()
    batches = [architecture.batch(seed) for seed in range(2)]
    plan = smt_ext.make_plan(
        model,
        batches,
        budget="40% of targets",
        block_size=16,
        targets="all-linear",
        allocation="uniform",
        progress=False,
    )
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    for seed in range(3):
        model(**architecture.batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    smt_ext.save_blocks(model, tmp_path / "blocks")
    trained = outputs(model, architecture)

    base = architecture.model()
    untrained = outputs(base, architecture)
    assert (trained - untrained).abs().max() > 1e-2
    smt_ext.load_blocks(base, tmp_path / "blocks", name="set")
    assert torch.equal(outputs(smt_ext.block_sets.activate(base, "set"), architecture), trained)
    assert torch.equal(outputs(smt_ext.block_sets.deactivate(base), architecture), untrained)

    smt_ext.export(model, tmp_path / "delta", "delta")
    changed = apply_delta(architecture.model(), tmp_path / "delta")
    assert torch.equal(outputs(changed, architecture), trained)

    if any(".experts." in name for name in plan.layers):
        assert architecture.name in EXPERTS
        with pytest.raises(
            smt_ext.PatchError, match=r"experts.*holds the matrices of all experts.*smt_ext.export"
        ):
            smt_ext.export(model, tmp_path / "lora", "peft-lora")
        return
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    adapted = PeftModel.from_pretrained(architecture.model(), str(tmp_path / "lora")).eval()
    # Within a few times the float32 rounding of the trained model itself: twice the sums, in another
    # order.
    exact = outputs(smt_ext.unpatch(copy.deepcopy(model)).double(), _in_float64(architecture))
    bound = 8 * (trained.double() - exact).abs().max()
    assert bound < 1e-3 * (trained - untrained).abs().max()
    assert (outputs(adapted, architecture).double() - exact).abs().max() <= bound


def _in_float64(architecture):
    def batch(seed):
        tensors = architecture.batch(seed)
        return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}

    return dataclasses.replace(architecture, batch=batch)
