"""Planning on a quantised model: the dense scores, one dequantised weight at a time."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import smt_ext
from models import token_batch
from quantized_models import SCHEMES, needs, quant_llama, values_of
from smt_ext import quantization
from smt_ext.errors import PlanError
from smt_ext.planning.scoring import score_blocks
from smt_ext.planning.targets import select_targets

TARGETS = ["qkv", "down_proj"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _library(request):
    if hasattr(request.node, "callspec") and "scheme" in request.node.callspec.params:
        pytest.importorskip(needs(request.node.callspec.params["scheme"]))


def dequantised(model, scheme):
    for name, module in list(model.named_modules()):
        if quantization.packed_weight(module) is not None:
            weight = values_of(module, scheme)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    return model


def scores(model, metric):
    batches = [token_batch(seed) for seed in range(3)]
    found = score_blocks(
        model, select_targets(model, TARGETS), batches, block_size=32, metric=metric, progress=False
    )
    return {name: score.values for name, score in found.scores.items()}


@each_scheme
@pytest.mark.parametrize("metric", ["mean_abs", "wanda", "weight"])
@pytest.mark.parametrize("training", [False, True], ids=("eval", "train"))
def test_scores_are_those_of_the_dequantised_model(scheme, metric, training):
    model = quant_llama(scheme).train(training)
    # Linears that are not scored may round their inputs, to 8 bits in bitsandbytes' in eval mode.
    rounds = metric != "weight" and "int" in scheme
    tolerance = 0.2 if rounds else 1e-4
    expected = scores(dequantised(quant_llama(scheme).train(training), scheme), metric)
    found = scores(model, metric)
    assert found.keys() == expected.keys()
    assert len(found) == 8
    for name, value in found.items():
        assert value.max() > 0
        np.testing.assert_allclose(
            value, expected[name], rtol=tolerance, atol=tolerance / 10 * value.max()
        )


@pytest.mark.parametrize("scheme", ["nf4-double", "bnb-int8"])
def test_no_two_dequantised_weights_are_held_at_a_time(scheme, monkeypatch):
    model = quant_llama(scheme)
    alive: list[weakref.ref] = []
    most = 0

    def counted(original):
        def dequantize(self, tensors, dtype):
            nonlocal most
            out = original(self, tensors, dtype)
            alive.append(weakref.ref(out))
            most = max(most, sum(ref() is not None for ref in alive))
            return out

        return dequantize

    for kind in (quantization.Bnb4bit, quantization.BnbInt8):
        monkeypatch.setattr(kind, "dequantize", counted(kind.dequantize))
    plan = smt_ext.make_plan(
        model,
        [token_batch(s) for s in range(2)],
        budget="4 blocks",
        block_size=32,
        targets=TARGETS,
        progress=False,
    )
    assert plan.num_blocks == 4
    smt_ext.patch(model, plan)
    gc.collect()
    assert len(alive) > 16
    assert most == 1


def test_planning_leaves_the_modules_as_they_were():
    pytest.importorskip("bitsandbytes")
    model = quant_llama("nf4")
    before = {name: type(m) for name, m in model.named_modules()}
    flags = {n: getattr(m, "support_avx512bf16_for_cpu", None) for n, m in model.named_modules()}
    scores(model.eval(), "wanda")
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert flags == {
        n: getattr(m, "support_avx512bf16_for_cpu", None) for n, m in model.named_modules()
    }
    assert quantization.repacked(model) is None


def test_a_repacked_model_is_refused():
    pytest.importorskip("bitsandbytes")
    model = quant_llama("nf4").eval()
    linear = model.model.layers[0].self_attn.v_proj
    if not linear.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on CPUs with AVX-512 BF16 only")
    with torch.no_grad():
        model(**token_batch())
    with pytest.raises(PlanError, match=r"v_proj.*before its first forward"):
        select_targets(model, "v")


@each_scheme
def test_a_share_of_the_budget_is_of_weights_and_not_of_packed_bytes(scheme):
    plans = [
        smt_ext.make_plan(model, None, budget="5%", block_size=32, targets="qkv", metric="random")
        for model in (quant_llama(scheme), dequantised(quant_llama(scheme), scheme))
    ]
    assert plans[0].num_blocks == plans[1].num_blocks > 8
