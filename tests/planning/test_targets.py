"""Which modules a plan may choose from."""

from __future__ import annotations

import pytest
from torch import nn

from models import mlp, tiny_llama
from smt_ext import PlanError
from smt_ext.planning.targets import select_targets


def kinds(model, targets):
    return sorted({name.rpartition(".")[2] for name in select_targets(model, targets)})


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("q", ["q_proj"]),
        (("q", "k", "v"), ["k_proj", "q_proj", "v_proj"]),
        ("qkv", ["k_proj", "q_proj", "v_proj"]),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("v_proj", ["v_proj"]),
        ("*.self_attn.[kv]_proj", ["k_proj", "v_proj"]),
        (r"re:.*\.(up|down)_proj", ["down_proj", "up_proj"]),
    ],
)
def test_patterns(targets, want):
    assert kinds(tiny_llama(), targets) == want


def test_a_pattern_may_name_single_layers():
    names = list(select_targets(tiny_llama(), "model.layers.1.*"))
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)


def test_all_linear_leaves_the_head_out_tied_or_not():
    for tied in (True, False):
        assert "lm_head" not in kinds(tiny_llama(tie_word_embeddings=tied), "all-linear")
    assert "lm_head" in kinds(tiny_llama(tie_word_embeddings=False), ("all-linear", "lm_head"))


def test_targets_are_in_the_models_order_without_repeats():
    model = tiny_llama()
    assert list(select_targets(model, ("v", "q", "v_proj"))) == [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name[-6:] in ("q_proj", "v_proj")
    ]


def test_a_tied_weight_is_refused_with_the_way_out():
    with pytest.raises(
        PlanError, match=r"'lm_head' shares its weight with 'model.embed_tokens.weight'.*untie"
    ):
        select_targets(tiny_llama(), "lm_head")


@pytest.mark.parametrize("pattern", ["c_attn", "re:nothing", "x.*"])
def test_nothing_matches_lists_what_there_is(pattern):
    with pytest.raises(PlanError, match="MLP has: down_proj, gate_proj, up_proj; aliases: q, k"):
        select_targets(mlp(), pattern)


def test_a_broken_regular_expression_and_an_empty_list():
    with pytest.raises(PlanError, match="'re:\\(' is no regular expression"):
        select_targets(mlp(), "re:(")
    with pytest.raises(PlanError, match="targets is empty"):
        select_targets(mlp(), [])
