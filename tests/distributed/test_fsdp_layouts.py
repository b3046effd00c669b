"""FSDP2 on weights that are stored in other ways: Conv1D (K, N), and experts (E, N, K)."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import smt_ext
from models import token_batch
from processes import run_ranks
from smt_ext import BlockPlan, LayerPlan, PatchError, layouts
from smt_ext.distributed import sharding

STEPS = 3
SIZE = 16
LR = 1e-2
# Of Adam. transformers computes losses and norms in float32, whatever the model: gradients on several
# ranks differ by rounding, and what a step moves by LR / EPS times that. Theirs are below 0.1 here.
EPS = 1e-3
GRADIENT_ROUNDING = 1e-6


def gpt2():
    """48 rows of the stored Conv1D weight over 2 ranks: shards of 24 rows begin within a block."""
    config = {"vocab_size": 128, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**config, **dropout, bos_token_id=1, eos_token_id=2))


def mixtral():
    """4 experts over 2 or 3 ranks: of three, the last has none."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


MODELS = {"GPT-2": gpt2, "Mixtral": mixtral}


def base(name):
    torch.manual_seed(0)
    return MODELS[name]()


def patched(name):
    """Some blocks of every weight that can train: about a third, spread by number."""
    model = base(name)
    layers = {}
    for layer, matrix in layouts.matrices(model):
        if layer == "lm_head":
            continue
        shape = tuple(layouts.weight_NK(matrix).shape)
        rows, cols = (-(-side // SIZE) for side in shape)
        blocks = [(r, c) for r in range(rows) for c in range(cols) if (r + 2 * c) % 3 == 0]
        layers[layer] = LayerPlan(shape=shape, block_size=SIZE, blocks=tuple(blocks))
    return smt_ext.patch(model, BlockPlan(layers=layers)).train()


def shard(model, **settings):
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def make_optimizer(model, kind="SparseAdamW"):
    if kind == "SparseAdamW":
        return smt_ext.SparseAdamW(model, lr=LR, eps=EPS)
    blocks = [module.blocks for module in smt_ext.smt_modules(model).values()]
    return torch.optim.AdamW(blocks, lr=LR, eps=EPS, weight_decay=0.0)


def train(model, optimizer, steps=range(STEPS), rank=0, world=1):
    for step in steps:
        ids = token_batch(seed=step, batch=6)["input_ids"].chunk(world)[rank]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def whole_state(model):
    return {name: sharding.full(v).detach().clone() for name, v in model.state_dict().items()}


def train_rank(rank, world, name, kind, folder):
    model = shard(patched(name))
    optimizer = make_optimizer(model, kind)
    train(model, optimizer, range(STEPS - 1), rank, world)
    smt_ext.save_training_state(f"{folder}/state", model, optimizer)
    train(model, optimizer, range(STEPS - 1, STEPS), rank, world)
    smt_ext.save_blocks(model, f"{folder}/blocks")
    found, end = {}, whole_state(model)

    modules = smt_ext.smt_modules(model)
    assert all(isinstance(m.weight, DTensor) for m in modules.values())
    found["weights hold blocks"] = all(
        torch.equal(m.read_blocks(), sharding.full(m.blocks)) for m in modules.values()
    )
    batch = token_batch(seed=9)
    with torch.no_grad(), smt_ext.original_weights(model):
        found["original"] = torch.equal(model(**batch).logits, base(name).train()(**batch).logits)

    again = shard(patched(name))
    optimizer = make_optimizer(again, kind)
    smt_ext.load_training_state(f"{folder}/state", again, optimizer)
    train(again, optimizer, range(STEPS - 1, STEPS), rank, world)
    resumed = whole_state(again)
    found["resumed"] = all(torch.equal(resumed[n], end[n]) for n in end)

    # A plain model's weights: the blocks follow them.
    plain = {n: v for n, v in model.state_dict().items() if not n.endswith(".blocks")}
    loaded = shard(patched(name))
    loaded.load_state_dict(plain, strict=False)
    state = whole_state(loaded)
    found["blocks follow"] = all(torch.equal(state[n], end[n]) for n in end)
    return found, end


@pytest.mark.parametrize(
    ("name", "world", "kind"),
    [("GPT-2", 2, "SparseAdamW"), ("GPT-2", 3, "AdamW"), ("Mixtral", 2, "AdamW"),
     ("Mixtral", 3, "SparseAdamW")],
)  # fmt: skip
def test_equals_one_process(tmp_path, name, world, kind):
    ranks = run_ranks(train_rank, world, tmp_path / "ranks", world, name, kind, str(tmp_path))
    alone = patched(name)
    train(alone, make_optimizer(alone, kind))
    expected, before = whole_state(alone), whole_state(patched(name))
    names = [n for n in expected if not torch.equal(expected[n], before[n])]
    assert {n for n in expected if n.endswith(".blocks")} < set(names)
    for found, state in ranks:
        assert all(found.values()), found
        for n, value in expected.items():
            assert torch.equal(state[n], ranks[0][1][n]), n
            bound = STEPS * LR * GRADIENT_ROUNDING / EPS
            torch.testing.assert_close(state[n], value, rtol=0, atol=bound)
    assert min(float((expected[n] - before[n]).abs().max()) for n in names) > LR / 10
    loaded = smt_ext.load_blocks(base(name), tmp_path / "blocks").state_dict()
    for n, value in ranks[0][1].items():
        assert torch.equal(loaded[n], value), n


def ignored_rank(rank, world):
    """Experts with a part of them in ``ignored_params``."""
    model = patched("Mixtral")
    weights = {p for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj")}
    shard(model, ignored_params=weights)
    optimizer = make_optimizer(model)
    train(model, optimizer, rank=rank, world=world)
    kept = [m for n, m in smt_ext.smt_modules(model).items() if n.endswith("experts.gate_up_proj")]
    assert len(kept) == 2
    assert not any(isinstance(m.weight, DTensor) for m in kept)
    assert all(torch.equal(m.read_blocks(), sharding.full(m.blocks)) for m in kept)

    model = patched("Mixtral")
    blocks = {p for n, p in model.named_parameters() if n.endswith("smt_gate_up_proj.blocks")}
    for_torch = make_optimizer(model, "AdamW")  # built before: holds the blocks that stay whole
    shard(model, ignored_params=blocks)
    told = r"'model\.layers\.0\.mlp\.experts\.gate_up_proj'.*out of ignored_params"
    with pytest.raises(PatchError, match=told):
        make_optimizer(model)
    before = whole_state(model)
    model(**token_batch()).loss.backward()
    with pytest.raises(PatchError, match=told):
        for_torch.step()
    assert not for_torch.state
    return whole_state(model).keys() == before.keys()


def test_a_part_of_experts_may_stay_whole_but_not_the_blocks_alone(tmp_path):
    assert run_ranks(ignored_rank, 2, tmp_path / "ranks", 2) == [True, True]


def columns_rank(rank):
    """A cut along the columns is refused before a step changes anything."""

    def cut(parameter):
        return Shard(1) if parameter.shape == (48, 144) else None

    model = patched("GPT-2")
    shard(model, shard_placement_fn=cut)
    told = (
        r"'transformer\.h\.0\.attn\.c_attn'.*shape \(48, 144\).*Shard\(dim=1\).*expected Shard\(0\)"
    )
    with pytest.raises(PatchError, match=told):
        make_optimizer(model)
    optimizer = make_optimizer(model, "AdamW")
    before = whole_state(model)
    model(**token_batch()).loss.backward()
    with pytest.raises(PatchError, match=told):
        optimizer.step()
    assert not optimizer.state
    after = whole_state(model)
    return all(torch.equal(after[n], before[n]) for n in before)


def test_another_cut_is_refused_by_name(tmp_path):
    assert run_ranks(columns_rank, 2, tmp_path / "ranks") == [True, True]
