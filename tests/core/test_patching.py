"""Law 1: patching is reversible, all or nothing, and idempotent; what it refuses, by name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import smt_ext
from models import MLP_LAYERS, llama_plan, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext import BlockPlan, LayerPlan, PatchError, PlanError
from smt_ext.nn.modules import SMTLinear
from smt_ext.nn.patching import plan_of


def snapshot(model):
    """Everything that patching may touch and unpatching must bring back."""
    return {
        "modules": {name: (id(m), type(m)) for name, m in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "attributes": {name: set(m.__dict__) for name, m in model.named_modules()},
        "buffers": {name: set(m._non_persistent_buffers_set) for name, m in model.named_modules()},
    }


def assert_same(before, after):
    for key in ("modules", "parameters", "attributes", "buffers"):
        assert before[key] == after[key], key
    assert list(before["state"]) == list(after["state"])
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_patch_then_unpatch_restores_everything(dtype):
    model = mlp(dtype)
    model.up_proj.weight.requires_grad_(False)
    x = torch.randn(5, 96, dtype=dtype)
    before, y = snapshot(model), model(x)
    assert smt_ext.patch(model, mlp_plan()) is model
    assert torch.equal(model(x), y)
    assert [type(m) for m in model.children()] == [SMTLinear] * 3
    smt_ext.unpatch(model)
    assert_same(before, snapshot(model))
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert torch.equal(model(x), y)


def test_only_blocks_train():
    model = smt_ext.patch(tiny_llama(), llama_plan(tiny_llama()))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 6
    assert all(name.endswith(".blocks") for name in trainable)


def test_without_freeze_other_parameters_stay_trainable():
    model = smt_ext.patch(mlp(), mlp_plan(), freeze=False)
    assert model.gate_proj.bias.requires_grad
    assert not model.gate_proj.weight.requires_grad


def test_blocks_hold_the_weight_and_are_float32_for_half_precision():
    model = mlp(torch.bfloat16)
    weight = model.gate_proj.weight.detach().clone()
    smt_ext.patch(model, mlp_plan())
    assert model.gate_proj.blocks.dtype == torch.float32
    assert torch.equal(model.gate_proj.blocks[1], weight[:32, 64:96].float())
    down = model.down_proj.blocks[1]
    assert torch.equal(down[:18], model.down_proj.weight[32:50, :32].float())
    assert not down[18:].any()


def test_block_dtype_can_be_the_weights_own():
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan(), block_dtype=torch.bfloat16)
    assert model.up_proj.blocks.dtype == torch.bfloat16


def test_same_plan_again_changes_nothing():
    model = smt_ext.patch(mlp(), mlp_plan())
    blocks = model.gate_proj.blocks
    assert smt_ext.patch(model, mlp_plan()) is model
    assert model.gate_proj.blocks is blocks


def test_another_plan_is_refused_with_the_way_out():
    model = smt_ext.patch(mlp(), mlp_plan())
    other = BlockPlan(layers={"gate_proj": MLP_LAYERS["gate_proj"]})
    with pytest.raises(PatchError, match=r"another plan.*unpatch"):
        smt_ext.patch(model, other)
    assert plan_of(model) == mlp_plan()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nowhere": MLP_LAYERS["up_proj"]}, "nowhere"),
        (
            {"up_proj": LayerPlan(shape=(64, 64), block_size=32, blocks=((0, 0),))},
            "up_proj",
        ),
    ],
    ids=["missing module", "other shape"],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(PlanError, match=message):
        smt_ext.patch(model, BlockPlan(layers=plan))
    assert_same(before, snapshot(model))


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_linear_subclass_is_refused():
    model = mlp()
    model.up_proj = Doubling(96, 64)
    with pytest.raises((PatchError, PlanError), match=r"up_proj.*Doubling"):
        smt_ext.patch(model, mlp_plan())
    assert type(model.gate_proj) is nn.Linear


def test_a_tied_weight_is_refused_by_both_names():
    model = tiny_llama()
    layer = LayerPlan(shape=(128, 96), block_size=32, blocks=((0, 0),))
    with pytest.raises(PatchError, match=r"'lm_head' shares its weight with 'model.embed_tokens"):
        smt_ext.patch(model, BlockPlan(layers={"lm_head": layer}))


def test_meta_and_integer_weights_are_refused():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(PatchError, match="meta device"):
        smt_ext.patch(model, mlp_plan())
    model = mlp()
    model.up_proj.weight = nn.Parameter(torch.zeros(64, 96, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PatchError, match=r"up_proj.*int8"):
        smt_ext.patch(model, mlp_plan())


def test_a_failure_half_way_changes_nothing(monkeypatch):
    model = mlp()
    before = snapshot(model)
    convert, calls = SMTLinear.convert_, []

    def failing(linear, *args):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no memory for the third layer")
        return convert(linear, *args)

    monkeypatch.setattr(SMTLinear, "convert_", staticmethod(failing))
    with pytest.raises(MemoryError):
        smt_ext.patch(model, mlp_plan())
    assert_same(before, snapshot(model))


def test_hooks_and_references_survive():
    model = mlp()
    linear, seen = model.up_proj, []
    linear.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    smt_ext.patch(model, mlp_plan())
    assert model.up_proj is linear
    model(torch.randn(2, 96))
    assert seen == [SMTLinear]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_trains_on_its_own(copier):
    model = smt_ext.patch(mlp(), mlp_plan())
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    weight = model.up_proj.weight.detach().clone()
    optimizer = smt_ext.SparseAdamW(twin, lr=0.1)
    twin(torch.randn(4, 96)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.up_proj.weight, weight)
    assert not torch.equal(twin.up_proj.weight, weight)
    assert twin.up_proj._input_group is twin.gate_proj._input_group
    assert twin.up_proj._input_group is not model.gate_proj._input_group
    smt_ext.unpatch(twin, restore=True)
    assert torch.equal(twin.up_proj.weight, weight)
    assert twin.gate_proj.bias.requires_grad
    assert smt_ext.status(model).trainable == mlp_plan().num_parameters


def test_moving_to_another_dtype_keeps_weight_and_blocks_equal():
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan())
    with torch.no_grad():
        model.up_proj.blocks.add_(1e-5)
    smt_ext.sync_weights(model)
    model.to(torch.float32)
    assert model.up_proj.blocks.dtype == torch.float32
    assert torch.equal(model.up_proj.read_blocks(), model.up_proj.blocks)
    model.to(torch.float64)
    assert torch.equal(model.up_proj.read_blocks(), model.up_proj.blocks)
    model(torch.randn(3, 96, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("by_way_of_meta", [False, True])
@pytest.mark.parametrize("fill", [0, 1])
def test_an_emptied_model_that_is_loaded_anew_knows_its_blocks(by_way_of_meta, fill):
    """``to_empty`` empties the places of the blocks too, which are in no state dict."""
    trained = smt_ext.patch(mlp(), mlp_plan())
    with torch.no_grad():
        trained.up_proj.blocks.add_(1.0)
    state = copy.deepcopy(trained.state_dict())
    model = smt_ext.patch(mlp(), mlp_plan())
    if by_way_of_meta:
        model.to("meta")
    # What to_empty() does, with memory that holds something certain.
    model._apply(lambda tensor: torch.full_like(tensor, fill, device="cpu"))
    model.load_state_dict(state)
    for twin in (model, copy.deepcopy(model)):
        x = torch.randn(4, 96)
        assert torch.equal(twin(x), trained(x))
        trained.zero_grad(), twin(x).sum().backward(), trained(x).sum().backward()
        for name, module in smt_ext.smt_modules(trained).items():
            assert torch.equal(twin.get_parameter(f"{name}.blocks").grad, module.blocks.grad)
        twin.zero_grad()


def test_state_dict_round_trip_keeps_weight_and_blocks_equal():
    trained = smt_ext.patch(mlp(), mlp_plan())
    with torch.no_grad():
        trained.up_proj.blocks.add_(1.0)
    smt_ext.sync_weights(trained)
    fresh = smt_ext.patch(mlp(), mlp_plan())
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.up_proj.weight, trained.up_proj.weight)
    only_blocks = smt_ext.patch(mlp(), mlp_plan())
    state = {k: v for k, v in trained.state_dict().items() if k.endswith("blocks")}
    only_blocks.load_state_dict(state, strict=False)
    assert torch.equal(only_blocks.up_proj.weight, trained.up_proj.weight)
    only_weights = smt_ext.patch(mlp(), mlp_plan())
    state = {k: v for k, v in trained.state_dict().items() if not k.endswith("blocks")}
    only_weights.load_state_dict(state, strict=False)
    assert torch.equal(only_weights.up_proj.blocks, trained.up_proj.blocks)


def test_status_counts_what_trains():
    model = smt_ext.patch(mlp(torch.bfloat16), mlp_plan())
    status = smt_ext.status(model)
    assert status.trainable == 5 * 32 * 32 + 32 * 32 + 18 * 32
    assert status.total == sum(p.numel() for p in mlp().parameters())
    assert status.block_bytes == 7 * 32 * 32 * 4
    assert status.moment_bytes == 2 * status.block_bytes
    # gate and up share columns 0..96; down reads both of its column blocks.
    assert status.saved_bytes_per_token == (96 + 64) * 2
    text = str(status)
    assert "gate_proj" in text
    assert f"{status.trainable:,}" in text


def test_a_forward_of_its_own_is_refused_by_name():
    """As accelerate gives one to every module of a model on several devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, plan = mlp(), mlp_plan()
    hooks.add_hook_to_module(model.up_proj, hooks.ModelHook())
    for call in (
        lambda: smt_ext.patch(model, plan),
        lambda: smt_ext.make_plan(
            model, None, budget="20%", block_size=32, metric="random", targets="all-linear"
        ),
    ):
        with pytest.raises(
            (smt_ext.PatchError, smt_ext.PlanError), match="'up_proj' has a forward of its own"
        ):
            call()
    hooks.remove_hook_from_module(model, recurse=True)
    smt_ext.patch(model, plan)
    hooks.add_hook_to_module(model.up_proj, hooks.ModelHook())
    with pytest.raises(smt_ext.PatchError, match="'up_proj' has a forward of its own"):
        smt_ext.unpatch(model)
    assert smt_ext.smt_modules(model)
    hooks.remove_hook_from_module(model, recurse=True)
    smt_ext.unpatch(model)


@pytest.mark.parametrize("call", [smt_ext.status, smt_ext.unpatch, plan_of])
def test_an_unpatched_model_is_named_with_the_way_out(call):
    with pytest.raises(PatchError, match=r"MLP has no SMT layer.*smt_ext.patch"):
        call(mlp())


def test_generate_and_inference_mode():
    model = tiny_llama().eval()
    batch = token_batch()
    with torch.inference_mode():
        expected = model(batch["input_ids"]).logits
    smt_ext.patch(model, llama_plan(model))
    with torch.inference_mode():
        assert torch.equal(model(batch["input_ids"]).logits, expected)
    out = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 19)


def test_a_patch_whose_also_train_fails_changes_nothing(monkeypatch):
    model, plan = mlp(), mlp_plan()
    before = snapshot(model)

    def fails(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("smt_ext.nn.patching.train_also", fails)
    with pytest.raises(RuntimeError, match="no"):
        smt_ext.patch(model, plan)
    assert_same(before, snapshot(model))


def test_unpatching_does_without_a_bias_that_is_gone():
    model = smt_ext.patch(mlp(), mlp_plan())
    model.down_proj.bias = None
    smt_ext.unpatch(model)
    assert type(model.gate_proj) is nn.Linear
    assert model.gate_proj.weight.requires_grad


def test_a_compiled_or_parallel_model_is_refused_with_the_model_inside():
    for wrapper, inside in (
        (torch.compile(mlp()), "_orig_mod"),
        (nn.DataParallel(mlp()), "module"),
    ):
        with pytest.raises(PatchError, match=rf"model.{inside}"):
            smt_ext.patch(wrapper, BlockPlan({f"{inside}.{n}": p for n, p in MLP_LAYERS.items()}))


def test_weights_that_require_gradients_are_no_parameters_beside_the_blocks(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    model.gate_proj.weight.requires_grad_(True)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    smt_ext.load_blocks(mlp(), tmp_path / "blocks")


class Pair(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher


@pytest.mark.parametrize("nested", [False, True])
def test_a_module_that_holds_two_patched_models_is_refused_by_both_names(nested, tmp_path):
    models = [smt_ext.patch(mlp(), mlp_plan()) for _ in range(2)]
    pair = Pair(nn.DataParallel(models[0]) if nested else models[0], models[1])
    pair.teacher.down_proj.blocks.data.mul_(2.0)
    before = snapshot(pair)
    optimizer = torch.optim.SGD(pair.parameters())
    inside = r"module\." if nested else ""
    for call in (
        plan_of,
        smt_ext.status,
        smt_ext.sync_weights,
        smt_ext.unpatch,
        smt_ext.SparseAdamW,
        lambda m: smt_ext.patch(m, mlp_plan()),
        lambda m: smt_ext.train_also(m, ["student.down_proj.bias"]),
        lambda m: smt_ext.original_weights(m).__enter__(),
        lambda m: smt_ext.save_blocks(m, tmp_path / "blocks"),
        lambda m: smt_ext.load_blocks(m, tmp_path / "teacher"),
        lambda m: smt_ext.save_training_state(tmp_path / "state", m, optimizer),
        lambda m: smt_ext.load_training_state(tmp_path / "state", m, optimizer),
        lambda m: smt_ext.export(m, tmp_path / "merged"),
        lambda m: smt_ext.export(m, tmp_path / "delta", "delta"),
        lambda m: smt_ext.export(m, tmp_path / "lora", "peft-lora"),
    ):
        smt_ext.save_blocks(pair.teacher, tmp_path / "teacher")
        names = rf"'student\.{inside}gate_proj', 'teacher\.gate_proj'.*Pass one"
        with pytest.raises(PatchError, match=names):
            call(pair)
    assert_same(before, snapshot(pair))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    for one in (pair.student, pair.teacher):
        assert smt_ext.status(one).trainable == mlp_plan().num_parameters
        smt_ext.unpatch(one)


def sharing(how):
    model = mlp()
    gate, up = model.gate_proj, model.up_proj
    if how == "data":
        gate.weight = nn.Parameter(up.weight.data)
    elif how == "numpy":
        gate.weight = nn.Parameter(torch.from_numpy(up.weight.detach().numpy()))
    elif how == "buffer":
        model.register_buffer("average", gate.weight.detach()[10:20])
    elif how == "overlapping":
        flat = torch.randn(100 * 96)
        gate.weight = nn.Parameter(flat[: 64 * 96].view(64, 96))
        up.weight = nn.Parameter(flat[-64 * 96 :].view(64, 96))
    else:
        flat = torch.randn(128 * 96)
        gate.weight, up.weight = (nn.Parameter(part) for part in flat.view(2, 64, 96))
    return model


@pytest.mark.parametrize("how", ["data", "numpy", "buffer", "overlapping"])
def test_weights_that_share_memory_are_refused_as_tied(how):
    model, other = sharing(how), "average" if how == "buffer" else "up_proj.weight"
    with pytest.raises(PatchError, match=f"'gate_proj' shares its weight with '{other}'"):
        smt_ext.patch(model, mlp_plan())
    with pytest.raises(PlanError, match=f"'gate_proj' shares its weight with '{other}'"):
        smt_ext.make_plan(model, targets="gate_proj", budget="50%", metric="weight", block_size=32)
    assert type(model.gate_proj) is nn.Linear


@pytest.mark.parametrize("how", ["rows", "columns", "steps"])
def test_a_weight_whose_entries_share_memory_is_refused(how):
    model, memory = mlp(), torch.randn(64 * 96)
    weight = {
        "rows": memory[:96].expand(64, 96),
        "columns": memory[:64, None].expand(64, 96),
        "steps": memory.as_strided((64, 96), (95, 1)),
    }[how]
    model.gate_proj.weight = torch.nn.Parameter(weight)
    with pytest.raises(PatchError, match="entries of the weight of 'gate_proj' share memory"):
        smt_ext.patch(model, mlp_plan())
    assert not smt_ext.smt_modules(model)


def test_neighbours_in_one_memory_are_not_tied():
    model = smt_ext.patch(sharing("side by side"), mlp_plan())
    before = model.up_proj.weight.detach().clone()
    with torch.no_grad():
        model.gate_proj.blocks.add_(1.0)
    smt_ext.sync_weights(model)
    assert torch.equal(model.up_proj.weight, before)


def test_a_parameter_that_shares_memory_cannot_train_also():
    model = mlp()
    model.gate_proj.bias = nn.Parameter(model.down_proj.bias.data.new_zeros(64))
    model.down_proj.bias = nn.Parameter(model.gate_proj.bias.data[:50])
    smt_ext.patch(model, mlp_plan())
    with pytest.raises(PatchError, match=r"'gate_proj\.bias' shares memory with 'down_proj\.bias'"):
        smt_ext.train_also(model, ["gate_proj.bias"])
    assert not model.gate_proj.bias.requires_grad


def test_names_that_are_one_text_are_refused():
    model = smt_ext.patch(mlp(), mlp_plan())
    with pytest.raises(PatchError, match=r"\['gate_proj\.bias'\]"):
        smt_ext.train_also(model, "gate_proj.bias")


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_conversions_that_swap_parameters(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    smt_ext.train_also(model, ["gate_proj.bias"])
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2, weight_decay=0.1, decay_to="base")
    x = torch.randn(4, 96)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        smt_ext.save_blocks(model, tmp_path / "blocks")
        model.to(torch.float64).to(torch.float32)
    y = model(x).detach()
    loaded = smt_ext.load_blocks(mlp(), tmp_path / "blocks")
    assert torch.equal(loaded(x), y)
    with smt_ext.original_weights(model):
        assert torch.equal(model(x), mlp()(x))
    with torch.no_grad():
        model.gate_proj.blocks.mul_(2.0)
    assert not torch.equal(model(x), y)
    model.half().float()
    smt_ext.unpatch(model, restore=True)
