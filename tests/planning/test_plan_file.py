"""BlockPlan: validation, and the JSON that lives on disk."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smt_ext
from models import MLP_LAYERS, mlp, mlp_plan, tiny_llama
from smt_ext import BlockPlan, CheckpointError, LayerPlan, PlanError
from smt_ext.checkpoint.blocks import load_plan


@st.composite
def layer_plans(draw):
    n, k = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    size = draw(st.integers(16, 512))
    rows, cols = -(-n // size), -(-k // size)
    block = st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1))
    blocks = draw(st.sets(block, max_size=6))
    return LayerPlan(shape=(n, k), block_size=size, blocks=tuple(sorted(blocks)))


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(
    layers=st.dictionaries(names, layer_plans(), max_size=4),
    provenance=st.dictionaries(names, st.none() | st.integers() | st.text(max_size=5), max_size=3),
)
def test_json_round_trip(layers, provenance):
    plan = BlockPlan(layers=layers, provenance=provenance, input_groups=(tuple(layers),))
    again = BlockPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert hash(again) == hash(plan)


def test_save_load_copy_pickle(tmp_path):
    plan = smt_ext.make_plan(tiny_llama(), metric="weight", budget="4 blocks", block_size=16)
    plan.save(tmp_path / "new" / "plan.json")
    assert BlockPlan.load(tmp_path / "new" / "plan.json") == plan
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_plans_are_frozen():
    plan = mlp_plan()
    with pytest.raises(AttributeError):
        plan.layers = {}
    with pytest.raises(TypeError):
        plan.layers["gate_proj"] = MLP_LAYERS["up_proj"]
    with pytest.raises(AttributeError):
        plan.layers["gate_proj"].blocks = ()


def test_fingerprint_is_of_the_selection_alone():
    plan = mlp_plan()
    noted = BlockPlan(layers=plan.layers, provenance={"seed": 1})
    assert noted.fingerprint == plan.fingerprint
    assert noted != plan
    fewer = BlockPlan(layers={"up_proj": MLP_LAYERS["up_proj"]})
    assert fewer.fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (0, 96)}, "shape is"),
        ({"shape": (64.5, 96)}, "two whole numbers"),
        ({"block_size": 8}, "block_size is 8, expected 16 to 512"),
        ({"block_size": 1024}, "expected 16 to 512"),
        ({"block_size": 32.0}, "expected a whole number"),
        ({"block_size": True}, "expected a whole number"),
        ({"blocks": ((2, 0),)}, r"block \(2, 0\) is out of range.*grid of 2 x 3"),
        ({"blocks": ((0, 3),)}, "out of range"),
        ({"blocks": ((-1, 0),)}, "out of range"),
        ({"blocks": ((0, 0), (0, 0))}, r"\(0, 0\) is repeated"),
        ({"blocks": ((1, 0), (0, 2))}, r"\(0, 2\) comes after \(1, 0\)"),
        ({"blocks": ((0,),)}, "two whole numbers"),
        ({"blocks": (("a", "b"),)}, "two whole numbers"),
    ],
)
def test_a_wrong_layer_names_the_fault(change, message):
    with pytest.raises(PlanError, match=message):
        LayerPlan(**{"shape": (64, 96), "block_size": 32, "blocks": (), **change})


def test_plans_for_another_model():
    plan = mlp_plan()
    plan.validate(mlp())
    with pytest.raises(PlanError, match=r"'down_proj', but LlamaForCausalLM has no such module "
                                        r"\(it has 'model.layers.0.mlp.down_proj'\)"):  # fmt: skip
        plan.validate(tiny_llama())
    wider = BlockPlan(
        layers={"up_proj": LayerPlan(shape=(64, 128), block_size=32, blocks=((0, 0),))}
    )
    with pytest.raises(PlanError, match=r"shape \(64, 96\), but the plan was made for \(64, 128\)"):
        wider.validate(mlp())
    no_linear = BlockPlan(
        layers={"model.norm": LayerPlan(shape=(16, 16), block_size=16, blocks=())}
    )
    with pytest.raises(PlanError, match=r"'model.norm' is a LlamaRMSNorm, expected nn.Linear"):
        no_linear.validate(tiny_llama())


def edited(change):
    body = json.loads(mlp_plan().to_json())
    change(body)
    return json.dumps(body)


def set_block(body):
    body["layers"]["gate_proj"]["blocks"][0] = [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a block plan"),
        ("{", "damaged or cut off"),
        ("[]", "not a block plan"),
        ('{"format": "other"}', "not a block plan"),
        (edited(lambda b: b.update(version=2)), "version is 2.*this smt_ext reads"),
        (edited(lambda b: b.pop("version")), "version is None"),
        (edited(lambda b: b.pop("layers")), "missing or malformed"),
        (edited(lambda b: b.update(layers=[])), "missing or malformed"),
        (edited(lambda b: b["layers"]["up_proj"].pop("shape")), "missing or malformed"),
        (edited(lambda b: b["layers"]["up_proj"]["blocks"].append([9, 9])), "'up_proj'.*out of range"),
        (edited(lambda b: b["layers"]["up_proj"]["blocks"].append([1, 1])), "'up_proj'.*repeated"),
        (edited(lambda b: b.update(input_groups=[["x"]])), "'x', which is no layer"),
        (edited(set_block), "do not match its fingerprint"),
    ],
)  # fmt: skip
def test_a_damaged_file_names_itself_and_the_fault(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=f"plan.json.*(?s:{message})"):
        BlockPlan.load(path)


def test_every_truncation_is_seen(tmp_path):
    text = mlp_plan().to_json()
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(PlanError):
            BlockPlan.from_json(text[:end])


def test_the_plan_of_saved_blocks(tmp_path):
    smt_ext.save_blocks(smt_ext.patch(mlp(), mlp_plan()), tmp_path / "blocks")
    assert load_plan(tmp_path / "blocks") == mlp_plan()
    with pytest.raises(CheckpointError, match="Expected a directory that smt_ext saved"):
        load_plan(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"cannot load a block plan from .*nowhere.json"):
        BlockPlan.load(tmp_path / "nowhere.json")


def test_a_failed_save_leaves_the_old_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    mlp_plan().save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot save to .*plan\.json': No space left"):
        BlockPlan(layers={}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_the_table_shows_kinds_and_depth():
    plan = smt_ext.make_plan(
        tiny_llama(), metric="weight", budget="50% of targets", block_size=16, allocation="uniform"
    )
    text = str(plan)
    for word in ("q_proj", "k_proj", "v_proj", "layer 0", "layer 1", "share", "block size 16"):
        assert word in text
    shares = [float(line.split()[-1].rstrip("%")) for line in text.splitlines() if "_proj" in line]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_a_plan_prints_how_it_was_chosen():
    plan = smt_ext.make_plan(
        tiny_llama(), metric="random", budget="20% of targets", block_size=16, unit="column",
        allocation="uniform", targets="down_proj", depth=0.5, seed=3,
    )  # fmt: skip
    chosen = "metric random, unit column, allocation uniform, depth 0.5, seed 3"
    assert str(plan).splitlines()[1] == chosen
    assert "metric" not in str(BlockPlan(plan.layers))
