"""Which modules a plan may choose from."""

from __future__ import annotations

import pytest
from torch import nn

import smt_ext
from models import mlp, tiny_llama, token_batch
from smt_ext import PlanError
from smt_ext.memory import SavedBytes
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


def test_depth_keeps_the_upper_layers():
    model = tiny_llama(num_hidden_layers=4)
    for depth, first in ((0.5, 2), (0.51, 1), (0.01, 3), (1.0, 0)):
        plan = smt_ext.make_plan(
            model, budget="100% of targets", metric="weight", block_size=16, depth=depth
        )
        assert {int(name.split(".")[2]) for name in plan.layers} == set(range(first, 4))
        assert plan.provenance["depth"] == depth


def test_below_a_shallow_plan_nothing_is_kept_for_backward():
    model = tiny_llama(num_hidden_layers=4)
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out))
    saved = {}
    for depth in (1.0, 0.5):
        plan = smt_ext.make_plan(
            model, budget="100% of targets", metric="weight", block_size=16, depth=depth
        )
        smt_ext.patch(model, plan)
        outputs.clear()
        with SavedBytes(model) as found:
            loss = model(**token_batch()).loss
        saved[depth] = found.bytes
        assert [out.requires_grad for out in outputs] == [depth == 1.0] * 2 + [True] * 2
        loss.backward()
        assert all(m.blocks.grad.any() for m in smt_ext.smt_modules(model).values())
        smt_ext.unpatch(model)
    # The head and the loss are kept either way.
    assert saved[0.5] < 0.75 * saved[1.0]


def test_a_depth_that_means_nothing_says_so():
    for wrong in (0, -0.5, 1.5):
        with pytest.raises(PlanError, match="expected more than 0 and at most 1"):
            smt_ext.make_plan(tiny_llama(), metric="weight", block_size=16, depth=wrong)
    with pytest.raises(PlanError, match="'gate_proj' is in none"):
        smt_ext.make_plan(
            mlp(),
            budget="2 blocks",
            metric="weight",
            block_size=16,
            targets="all-linear",
            depth=0.5,
        )
    with pytest.raises(PlanError, match="all below layer 1 of 2"):
        smt_ext.make_plan(
            tiny_llama(), metric="weight", block_size=16, targets="model.layers.0.*", depth=0.5
        )
    two_stacks = nn.Module()
    two_stacks.encoder, two_stacks.decoder = nn.ModuleList([mlp()]), nn.ModuleList([mlp()])
    with pytest.raises(PlanError, match="there are decoder, encoder"):
        smt_ext.make_plan(
            two_stacks, metric="weight", block_size=16, targets="all-linear", depth=0.5
        )
