"""Law 7: saved blocks turn the base into the trained model, bit for bit; what loading refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import smt_ext
from models import llama_plan, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext import BlockPlan, CheckpointError, LayerPlan, PatchError
from smt_ext.checkpoint.blocks import read_blocks_info
from smt_ext.nn.patching import plan_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


FILES = ["blocks.safetensors", "smt_blocks.json", "smt_files.json"]


def trained_llama(dtype=torch.float32, steps=3, **options):
    model = tiny_llama(dtype)
    smt_ext.patch(model, llama_plan(model))
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2, **options)
    for step in range(steps):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_batch(9)["input_ids"]).logits


def saved(tmp_path, **options):
    model = trained_llama(**options)
    smt_ext.save_blocks(model, tmp_path / "blocks", metadata={"note": "Übung"})
    return model, tmp_path / "blocks"


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(".blocks")}


def assert_untouched(model, before):
    assert not smt_ext.smt_modules(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_onto_a_fresh_base_bit_for_bit(tmp_path, dtype):
    model, folder = saved(tmp_path, dtype=dtype)
    base = tiny_llama(dtype)
    assert not torch.equal(logits(base), logits(model))
    untrained = weights(base)
    assert smt_ext.load_blocks(base, folder) is base
    assert torch.equal(logits(base), logits(model))
    for name, module in smt_ext.smt_modules(base).items():
        assert torch.equal(module.blocks, smt_ext.smt_modules(model)[name].blocks)
    smt_ext.unpatch(base, restore=True)
    assert_untouched(base, untrained)


def test_float32_master_blocks_of_a_bfloat16_model(tmp_path):
    model = tiny_llama(torch.bfloat16)
    smt_ext.patch(model, llama_plan(model), block_dtype=torch.float32)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-3)
    model(**token_batch()).loss.backward()
    optimizer.step()
    smt_ext.save_blocks(model, tmp_path / "blocks")
    base = tiny_llama(torch.bfloat16)
    smt_ext.patch(base, llama_plan(base), block_dtype=torch.float32)
    smt_ext.load_blocks(base, tmp_path / "blocks")
    for name, module in smt_ext.smt_modules(base).items():
        assert torch.equal(module.blocks, smt_ext.smt_modules(model)[name].blocks)
    assert torch.equal(logits(base), logits(model))


def test_ragged_blocks_and_biases(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    x = torch.randn(4, 96)
    model(x).square().sum().backward()
    optimizer.step()
    smt_ext.save_blocks(model, tmp_path / "blocks")
    assert torch.equal(smt_ext.load_blocks(mlp(), tmp_path / "blocks")(x), model(x))


def test_the_artefact_is_small_and_says_what_it_is(tmp_path):
    model, folder = saved(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    info = read_blocks_info(folder)
    assert info["plan"] == plan_of(model)
    assert len(info["metadata"].pop("base_config")) == 64
    assert info["metadata"] == {"note": "Übung"}
    assert info["base_dtype"] is torch.float32
    numbers = sum(m.blocks.numel() for m in smt_ext.smt_modules(model).values())
    assert (folder / "blocks.safetensors").stat().st_size < 4 * numbers + 2000


def test_saving_again_replaces(tmp_path):
    model, folder = saved(tmp_path)
    smt_ext.save_blocks(model, folder, readme="a card")
    smt_ext.save_blocks(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["blocks"]


def test_loading_twice_and_onto_the_same_plan(tmp_path):
    model, folder = saved(tmp_path)
    base = tiny_llama()
    smt_ext.patch(base, llama_plan(base))
    smt_ext.load_blocks(base, folder)
    smt_ext.load_blocks(base, folder)
    assert torch.equal(logits(base), logits(model))


def test_another_base_is_refused_by_the_first_module_that_differs(tmp_path):
    model, folder = saved(tmp_path)
    other = tiny_llama(seed=1)
    before = weights(other)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.self_attn.q_proj' holds other values than the base"
    ):
        smt_ext.load_blocks(other, folder)
    assert_untouched(other, before)
    smt_ext.load_blocks(other, folder, strict_base=False)
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(
        smt_ext.smt_modules(other)[name].blocks, smt_ext.smt_modules(model)[name].blocks
    )


def test_another_dtype_is_refused_with_the_right_one(tmp_path):
    _, folder = saved(tmp_path)
    other = tiny_llama(torch.bfloat16)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"dtype bfloat16.*Load the base model in float32"):
        smt_ext.load_blocks(other, folder)
    assert_untouched(other, before)


def test_another_architecture_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(smt_ext.PlanError, match="has no such module"):
        smt_ext.load_blocks(mlp(), folder)
    with pytest.raises(smt_ext.PlanError, match=r"weight of shape \(32, 64\).*\(48, 96\)"):
        smt_ext.load_blocks(tiny_llama(hidden_size=64), folder)


def test_another_plan_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    other = tiny_llama()
    smt_ext.patch(other, llama_plan(other, kinds=("v_proj",)))
    with pytest.raises(PatchError, match=r"patched with another plan.*unpatch"):
        smt_ext.load_blocks(other, folder)


def test_an_unpatched_model_cannot_be_saved(tmp_path):
    with pytest.raises(PatchError, match="has no SMT layer"):
        smt_ext.save_blocks(tiny_llama(), tmp_path / "blocks")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty"])
def test_damage_is_seen_and_changes_nothing(tmp_path, name, damage):
    _, folder = saved(tmp_path)
    path = folder / name
    content = path.read_bytes()
    base = tiny_llama()
    before = weights(base)
    spots = range(1, len(content), max(1, len(content) // 40)) if damage in ("flip", "cut") else [0]
    for spot in spots:
        if damage == "flip":
            path.write_bytes(content[:spot] + bytes([content[spot] ^ 4]) + content[spot + 1 :])
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:spot])
        with pytest.raises(CheckpointError, match=f"{name}|damaged"):
            smt_ext.load_blocks(base, folder)
        assert_untouched(base, before)


def test_a_version_from_the_future(tmp_path):
    _, folder = saved(tmp_path)
    path = folder / "smt_blocks.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(CheckpointError, match=r"has version 3, and this smt_ext reads 2\. Update"):
        smt_ext.load_blocks(tiny_llama(), folder)


def test_a_folder_that_is_none_of_ours(tmp_path):
    _, blocks = saved(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"Do you mean '{blocks}'"):
        smt_ext.load_blocks(tiny_llama(), blocks.parent)
    with pytest.raises(CheckpointError, match=r"No such file or directory\. Expected a directory"):
        smt_ext.load_blocks(tiny_llama(), tmp_path / "nowhere")
    (tmp_path / "smt_blocks.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is no smt_ext.blocks file"):
        smt_ext.load_blocks(tiny_llama(), tmp_path)


def test_tensors_swapped_between_artefacts(tmp_path):
    _, folder = saved(tmp_path)
    smt_ext.save_blocks(trained_llama(steps=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "blocks.safetensors", folder)
    with pytest.raises(CheckpointError, match="sha256"):
        smt_ext.load_blocks(tiny_llama(), folder)


def test_a_layer_without_blocks_is_kept(tmp_path):
    plan = BlockPlan(
        layers={
            **mlp_plan().layers,
            "up_proj": LayerPlan(shape=(64, 96), block_size=32, blocks=()),
        }
    )
    model = smt_ext.patch(mlp(), plan)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    assert plan_of(smt_ext.load_blocks(mlp(), tmp_path / "blocks")) == plan


def test_a_part_of_the_patched_model_and_two_models_in_one_are_named(tmp_path):
    model = trained_llama(steps=1)
    part = model.model.layers[0]
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.\S+' is not found.*not a part"):
        smt_ext.save_blocks(part, tmp_path / "blocks")
    pair = torch.nn.ModuleList([model, trained_llama(steps=1)])
    with pytest.raises(PatchError, match=r"holds 2 models.*'0\.model\..*'1\.model\..*Pass one"):
        smt_ext.save_blocks(pair, tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()
    wrapped = torch.nn.ModuleDict({"inner": model})
    smt_ext.save_blocks(wrapped, tmp_path / "blocks")
    loaded = smt_ext.load_blocks(tiny_llama(), tmp_path / "blocks").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_blocks_are_fetched_by_their_name_on_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    smt_ext.save_blocks(smt_ext.patch(mlp(), mlp_plan()), tmp_path / "saved")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/absent":
            raise errors.LocalEntryNotFoundError("offline")
        return str(tmp_path / "saved")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert smt_ext.smt_modules(smt_ext.load_blocks(mlp(), "org/trained"))
    assert asked == [("org/trained", ["smt_blocks.json", "blocks.safetensors"])]
    with pytest.raises(CheckpointError, match=r"no folder 'org/absent', and .* hub: offline"):
        smt_ext.load_blocks(mlp(), "org/absent")
    for name in ("a/b/c", "./absent", str(tmp_path / "absent")):  # paths, whatever is at them
        with pytest.raises(CheckpointError, match="cannot read"):
            smt_ext.load_blocks(mlp(), name)
    assert len(asked) == 2


def test_a_save_into_the_present_folder_leaves_it_in_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = smt_ext.patch(mlp(), mlp_plan())
    smt_ext.save_blocks(model, ".")
    assert Path("smt_blocks.json").exists()
    smt_ext.load_blocks(mlp(), ".")


def test_a_set_of_float16_saturates_as_training_does(tmp_path):
    model = smt_ext.patch(mlp(torch.float16), mlp_plan())
    with torch.no_grad():
        model.gate_proj.blocks.fill_(1e6)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    base = smt_ext.load_blocks(mlp(torch.float16), tmp_path / "blocks", name="large")
    smt_ext.block_sets.activate(base, "large")
    assert torch.equal(base.gate_proj.weight, smt_ext.unpatch(model).gate_proj.weight)
    assert base.gate_proj.weight.isfinite().all()
    smt_ext.block_sets.deactivate(base)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"metadata": ["note"]}, "metadata is a list, expected a dictionary"),
        ({"metadata": {"when": {1, 2}}}, "metadata holds what JSON cannot.*set"),
        ({"readme": Path("README.md")}, "readme is a PosixPath, expected the text"),
    ],
)
def test_extras_that_cannot_be_kept_are_refused_before_anything_is_written(tmp_path, extra, told):
    with pytest.raises(CheckpointError, match=told):
        smt_ext.save_blocks(smt_ext.patch(mlp(), mlp_plan()), tmp_path / "blocks", **extra)
    assert not list(tmp_path.iterdir())
