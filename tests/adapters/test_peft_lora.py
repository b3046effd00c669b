"""The exact LoRA adapter: what it multiplies out to, its rank, and plain PEFT loading it."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import smt_ext
from models import blocks_of, llama_plan, mask_of, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext import BlockPlan, CheckpointError, LayerPlan, PatchError
from smt_ext.checkpoint.peft_lora import check_peft_lora, exact_factors

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trained_llama(dtype=torch.float32, steps=3):
    model = tiny_llama(dtype).eval()
    smt_ext.patch(model, llama_plan(model, KINDS))
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    for step in range(steps):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_batch(9)["input_ids"]).logits


def plain(model, dtype):
    """An unpatched copy that computes in ``dtype`` with the same weights."""
    return smt_ext.unpatch(copy.deepcopy(model)).to(dtype)


def with_adapter(base, folder):
    return PeftModel.from_pretrained(base, str(folder)).eval()


def assert_as_close_as_the_model_itself(got, model, base):
    """Within a few times the rounding error that the trained model's own float32 forward has."""
    exact = logits(plain(model, torch.float64))
    own = (logits(plain(model, torch.float32)).double() - exact).abs().max()
    change = (logits(base).double() - exact).abs().max()
    # Twice the sums, in another order.
    bound = 4 * own
    assert bound < 1e-3 * change
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_computes_the_trained_model(tmp_path, dtype, uniform):
    model = trained_llama(dtype)
    adapter = smt_ext.export(model, tmp_path / "lora", "peft-lora", uniform_rank=uniform)
    base = tiny_llama(dtype).eval().float()
    loaded = with_adapter(copy.deepcopy(base), tmp_path / "lora")
    assert_as_close_as_the_model_itself(logits(loaded), model, base)
    assert len(adapter.ranks) == 7 * 2
    assert (len(set(adapter.ranks.values())) == 1) == uniform
    # Training can go on.
    model(**token_batch()).loss.backward()


def test_float64_weights_have_a_float64_adapter(tmp_path):
    model = trained_llama(torch.float64)
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    loaded = with_adapter(tiny_llama(torch.float64).eval(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-10, atol=1e-12)


def test_merged_by_peft_the_weights_are_the_trained_ones(tmp_path):
    model = trained_llama()
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    merged = with_adapter(tiny_llama().eval(), tmp_path / "lora").merge_and_unload()
    trained = plain(model, torch.float32).state_dict()
    for name, weight in merged.state_dict().items():
        # The difference is rounded once, and so is the sum.
        torch.testing.assert_close(weight, trained[name], rtol=2**-23, atol=2**-23)


LOAD = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "smt_ext" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[2]))
torch.save(model.eval()(input_ids=ids).logits, sys.argv[3])
"""


def test_loads_in_a_process_without_smt_ext_and_finds_its_base(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    smt_ext.patch(model, llama_plan(model, KINDS))
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "smt_files.json",
        "smt_lora.json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "lora"),
         json.dumps(token_batch(9)["input_ids"].tolist()), str(tmp_path / "logits")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_as_close_as_the_model_itself(torch.load(tmp_path / "logits"), model, tiny_llama().eval())


def test_every_reader_of_the_format_scales_by_one(tmp_path):
    model = trained_llama()
    for uniform in (False, True):
        folder = tmp_path / str(uniform)
        adapter = smt_ext.export(model, folder, "peft-lora", uniform_rank=uniform)
        config = json.loads((folder / "adapter_config.json").read_text())
        # vLLM: lora_alpha / r, whatever the shapes, which r must not fall short of.
        assert config["lora_alpha"] == config["r"] == adapter.max_rank
        assert config["rank_pattern"] == config["alpha_pattern"]
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, kind = name.removeprefix("base_model.model.").split(".lora_")
            rank = tensor.shape[0 if kind == "A.weight" else 1]
            assert rank == adapter.ranks[module]
            # llama.cpp: lora_alpha / the rank of the tensor.
            assert not uniform or rank == config["lora_alpha"]


class Nested(nn.Module):
    """Two layers whose names end alike, so that a pattern for one could match the other."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64, bias=False)
        self.inner = nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False)})

    def forward(self, x):
        return self.inner["proj"](torch.tanh(self.proj(x)))


def test_names_that_end_alike_keep_their_own_rank(tmp_path):
    def nested():
        torch.manual_seed(3)
        return Nested()

    layers = {
        "proj": LayerPlan((64, 64), 16, ((0, 0), (1, 2))),
        "inner.proj": LayerPlan((64, 64), 16, ((3, 3),)),
    }
    model = smt_ext.patch(nested(), BlockPlan(layers))
    optimizer = smt_ext.SparseAdamW(model, lr=1e-1)
    x = torch.randn(5, 64)
    model(x).square().sum().backward()
    optimizer.step()
    adapter = smt_ext.export(model, tmp_path / "lora", "peft-lora")
    assert adapter.ranks == {"inner.proj": 16, "proj": 32}
    loaded = with_adapter(nested(), tmp_path / "lora")
    assert loaded.base_model.model.proj.lora_A["default"].weight.shape == (32, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(80, 64), (71, 50), (16, 90)])
def test_the_factors_multiply_out_to_the_change_exactly(shape, wide):
    size = 16
    grid = -(-shape[0] // size), -(-shape[1] // size)
    every = list(itertools.product(range(grid[0]), range(grid[1])))
    generator = torch.Generator().manual_seed(sum(shape))
    for count in (1, 2, 4, 6, len(every)):
        chosen = torch.randperm(len(every), generator=generator)[:count].tolist()
        layer = LayerPlan(shape, size, tuple(sorted(every[i] for i in chosen)))
        dense = torch.randn(shape, generator=generator, dtype=wide)
        dense[torch.rand(shape[0], generator=generator) < 0.2] = 0
        dense[:, torch.rand(shape[1], generator=generator) < 0.2] = 0
        delta = blocks_of(dense, layer)
        a, b = exact_factors(delta, layer)
        back = dense * mask_of(layer)
        assert torch.equal(b @ a, back)
        assert len(a) == b.shape[1] <= min(back.any(1).sum(), back.any(0).sum())


def test_the_rank_is_the_smallest_number_of_rows_and_columns_that_touch_all_blocks():
    size, grid = 16, 5
    every = list(itertools.product(range(grid), range(grid)))
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 12, (), generator=generator))
        chosen = torch.randperm(len(every), generator=generator)[:count].tolist()
        layer = LayerPlan((grid * size,) * 2, size, tuple(sorted(every[i] for i in chosen)))
        a, _ = exact_factors(torch.ones(count, size, size), layer)
        best = min(
            len(rows) + len({c for r, c in layer.blocks if r not in rows})
            for n in range(grid + 1)
            for rows in itertools.combinations(range(grid), n)
        )
        assert len(a) == best * size


def test_a_row_and_a_column_of_blocks_need_two_and_not_five():
    cross = tuple(sorted({(2, i) for i in range(5)} | {(i, 1) for i in range(5)}))
    layer = LayerPlan((80, 80), 16, cross)
    dense = torch.randn(80, 80)
    dense[~mask_of(layer)] = 0
    a, b = exact_factors(blocks_of(dense, layer), layer)
    assert a.shape == (32, 80)
    assert b.shape == (80, 32)
    # The block where they cross is in the row's part alone.
    assert torch.equal(b @ a, dense)


def test_modules_without_a_change_are_left_out(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    with torch.no_grad():
        model.up_proj.blocks[1, 3, 5:9] += 1.0
    smt_ext.sync_weights(model)
    adapter = smt_ext.export(model, tmp_path / "lora", "peft-lora")
    assert adapter.ranks == {"up_proj": 1}
    assert adapter.num_bytes == 4 * (64 + 96)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(PatchError, match="has no SMT layer"):
        smt_ext.export(mlp(), tmp_path / "lora", "peft-lora")
    model = smt_ext.patch(mlp(), mlp_plan())
    with pytest.raises(PatchError, match="equal the original ones"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")
    with smt_ext.original_weights(model), pytest.raises(PatchError, match="original_weights"):
        smt_ext.export(model, tmp_path / "lora", "peft-lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unit", ["column", "row"])
def test_a_plan_of_whole_units_has_their_number_times_the_block_size_as_rank(tmp_path, unit):
    model = tiny_llama()
    plan = smt_ext.make_plan(
        model, budget="40% of targets", metric="random", unit=unit, allocation="uniform",
        targets="down_proj", block_size=16,
    )  # fmt: skip
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    axis = 1 if unit == "column" else 0
    units = {n: len({b[axis] for b in layer.blocks}) for n, layer in plan.layers.items()}
    assert min(units.values()) > 1
    adapter = smt_ext.export(model, tmp_path / "lora", "peft-lora")
    assert adapter.ranks == {name: 16 * count for name, count in units.items()}


def test_an_adapter_names_its_whole_base(tmp_path):
    model = trained_llama()
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    check_peft_lora(model, tmp_path / "lora")
    base = tiny_llama()
    check_peft_lora(base, tmp_path / "lora")
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds other values"):
        check_peft_lora(base, tmp_path / "lora")
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    with_adapter(base, tmp_path / "lora")  # PEFT itself does not look
    path = tmp_path / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        check_peft_lora(tiny_llama(), tmp_path / "lora")
