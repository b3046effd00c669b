"""No forward, save or export uses a weight that lacks the blocks' present values."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import smt_ext
from models import MLP_LAYERS, llama_plan, mask_of, mlp, mlp_plan, stack, tiny_llama
from processes import run_ranks
from smt_ext import PatchError

X = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))


def patched():
    return smt_ext.patch(mlp(), mlp_plan())


def blocks_of(model):
    return [module.blocks for module in smt_ext.smt_modules(model).values()]


@torch.no_grad()
def in_place(model):
    for blocks in blocks_of(model):
        blocks.mul_(-1.5)


def by_data(model):
    for blocks in blocks_of(model):
        blocks.data = blocks.detach() * -1.5


@torch.no_grad()
def by_vector(model):
    whole = torch.nn.utils.parameters_to_vector(blocks_of(model))
    torch.nn.utils.vector_to_parameters(whole * -1.5, blocks_of(model))


def by_new_parameter(model):
    for module in smt_ext.smt_modules(model).values():
        module.blocks = torch.nn.Parameter(module.blocks.detach() * -1.5)


@torch.no_grad()
def of_the_weight(model):
    """The other way round: blocks as they are, a weight that has lost them."""
    in_place(model)
    smt_ext.sync_weights(model)
    for module in smt_ext.smt_modules(model).values():
        untouched = mlp().get_submodule(module.layer_name).weight
        module.weight.copy_(untouched)


def of_the_weights_data(model):
    in_place(model)
    smt_ext.sync_weights(model)
    for module in smt_ext.smt_modules(model).values():
        module.weight.data.copy_(mlp().get_submodule(module.layer_name).weight)


def unseen(model):
    """As ``torch.distributed`` does, whose operations advance no version."""
    views = [blocks.data for blocks in blocks_of(model)]
    model(X)  # after which the views are no news
    for view in views:
        view.mul_(-1.5)


CHANGES = [
    in_place,
    by_data,
    by_vector,
    by_new_parameter,
    of_the_weight,
    of_the_weights_data,
    unseen,
]


def expected():
    model = patched()
    in_place(model)
    smt_ext.sync_weights(model)
    return {k: v.clone() for k, v in model.state_dict().items()}, model(X).detach()


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_out_of_the_model_sees_the_change(change, tmp_path):
    state, y = expected()
    uses = {
        "forward": lambda m: m(X).detach(),
        "forward without gradients": lambda m: torch.no_grad()(m)(X),
        "state": lambda m: m.state_dict(),
        "unpatch": lambda m: smt_ext.unpatch(m)(X).detach(),
        "copy": lambda m: copy.deepcopy(m)(X).detach(),
        "double": lambda m: m.double().float()(X).detach(),
        "original": lambda m: _after_original_weights(m),
    }
    if change is unseen:  # sync_weights is for this
        del uses["forward"], uses["forward without gradients"]
    for name, use in uses.items():
        model = patched()
        change(model)
        got = use(model)
        if name == "state":
            assert all(torch.equal(got[key], state[key]) for key in state), name
        else:
            assert torch.equal(got, y), name
    model = patched()
    change(model)
    smt_ext.export(model, tmp_path / "delta", "delta")
    model = patched()
    change(model)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    delta, saved = (
        load_file(next((tmp_path / d).glob("*.safetensors"))) for d in ("delta", "blocks")
    )
    for name, module in smt_ext.smt_modules(patched()).items():
        assert torch.equal(saved[f"{name}.blocks"], module.original_blocks * -1.5)
        change_of = delta[f"{name}.delta"].double()
        wanted = saved[f"{name}.blocks"].double() - module.original_blocks.double()
        assert torch.equal(change_of, wanted)


def _after_original_weights(model):
    with smt_ext.original_weights(model):
        model(X)
    return model(X).detach()


def test_a_change_inside_original_weights_counts_afterwards():
    _, y = expected()
    model = patched()
    with smt_ext.original_weights(model):
        base = model(X)
        in_place(model)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), y)


def test_pickled_and_copied_models_do_not_take_a_change_for_written():
    _, y = expected()
    for count in range(3):  # a copy's version counter starts anew
        model = patched()
        for _ in range(count):
            with torch.no_grad():
                for blocks in blocks_of(model):
                    blocks.mul_(1)
        smt_ext.sync_weights(model)
        in_place(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(X), y)
        assert torch.equal(copy.deepcopy(model)(X), y)


def test_an_unchanged_model_writes_nothing():
    model = patched()
    optimizer = smt_ext.SparseAdamW(model, lr=1e-3)
    foreign = torch.optim.AdamW(blocks_of(model), lr=1e-3)
    for either in (optimizer, foreign):
        model(X).sum().backward()
        either.step()
        versions = [m.weight._version for m in smt_ext.smt_modules(model).values()]
        model(X)
        model.state_dict()
        assert versions == [m.weight._version for m in smt_ext.smt_modules(model).values()]


def test_functional_call_leaves_the_weights_right():
    model = patched()
    y = model(X).detach()
    other = {k: v * 2 for k, v in model.named_parameters() if k.endswith(".blocks")}
    assert not torch.equal(torch.func.functional_call(model, other, (X,)), y)
    assert torch.equal(model(X), y)


LOAD_AND_STEP = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
blocks = [module.blocks for module in model.modules() if hasattr(module, "blocks")]
model(torch.ones(1, 96)).sum().backward()
# A fused step advances no version.
torch.optim.SGD(blocks, lr=1.0, fused=True).step()
torch.save((model.gate_proj.weight[:32, :32], blocks[0][0], model.state_dict()), sys.argv[2])
frozen = [module.weight for module in model.modules() if hasattr(module, "blocks")]
try:
    torch.optim.SGD(frozen, lr=1.0).step()
except Exception as error:
    print(type(error).__name__)
"""


def test_an_unpickled_model_trains_in_a_process_that_has_patched_nothing(tmp_path):
    torch.save(patched(), tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD_AND_STEP, tmp_path / "model.pt", tmp_path / "end.pt"]
    tests = Path(__file__).parents[1]  # where the model's class is
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tests)
    assert done.stdout.strip() == "PatchError"  # the hook that refuses frozen weights is there too
    weight, blocks, state = torch.load(tmp_path / "end.pt")
    assert torch.equal(weight, blocks)
    assert torch.equal(state["gate_proj.weight"][:32, :32], blocks)
    assert not torch.equal(blocks, patched().gate_proj.blocks[0])


def trained_elsewhere(seed=1):
    model = smt_ext.patch(mlp(seed=seed), mlp_plan())
    in_place(model)
    smt_ext.sync_weights(model)
    return model


def assigned(name):
    """A model that has not run since one of its tensors was assigned."""
    model = patched()
    for module in smt_ext.smt_modules(model).values():
        kept = getattr(module, name)
        setattr(module, name, nn.Parameter(kept.detach().clone(), kept.requires_grad))
    return model


@pytest.mark.parametrize(
    ("own", "backend"), [(None, None), (None, "eager"), ("weight", None), ("blocks", None)]
)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("given", ["all", "parameters", "weights", "blocks", "stale weights"])
def test_functional_call_reads_a_callers_tensors_and_writes_none(own, given, gradients, backend):
    torch._dynamo.reset()
    model, other = patched(), trained_elsewhere()
    y, wanted = model(X).detach(), other(X).detach()
    if own is not None:
        model = assigned(own)
    tensors = {k: v.detach().clone() for k, v in other.named_parameters()}
    if given == "parameters":
        tensors = dict(other.named_parameters())
    elif given == "weights":
        tensors = {k: v for k, v in tensors.items() if not k.endswith("blocks")}
    elif given == "blocks":
        tensors = {k: v for k, v in tensors.items() if k.endswith("blocks")}
        twin = patched()
        twin.load_state_dict(tensors, strict=False)
        wanted = twin(X).detach()
    elif given == "stale weights":
        tensors |= {k: v.detach().clone() for k, v in mlp(seed=1).named_parameters()}
    before = {k: v.detach().clone() for k, v in tensors.items()}

    def run(tensors, x):
        return torch.func.functional_call(model, tensors, (x,))

    if backend is not None:
        run = torch.compile(run, backend=backend)
    with torch.set_grad_enabled(gradients):
        got = run(tensors, X).detach()
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, y)
    assert all(torch.equal(tensors[k], before[k]) for k in before)
    assert torch.equal(model(X), y)
    assert torch.equal(other(X), trained_elsewhere()(X))


def test_transforms_of_torch_func_take_patched_models():
    models = [trained_elsewhere(1), trained_elsewhere(2)]
    model, given = patched(), {k: v.detach() for k, v in models[0].named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (X,)).square().mean()

    gradients = torch.func.grad(loss)(given)
    models[0](X).square().mean().backward()
    for name, module in smt_ext.smt_modules(models[0]).items():
        torch.testing.assert_close(gradients[f"{name}.blocks"], module.blocks.grad)
        inside = gradients[f"{name}.weight"][mask_of(MLP_LAYERS[name])]
        assert not inside.any()  # the blocks stand there

    base = copy.deepcopy(models[0]).to("meta")
    stacked = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (X,))

    y = torch.func.vmap(call)(*stacked)
    torch.testing.assert_close(y, torch.stack([model(X) for model in models]))


class Encoder(nn.Module):
    """torch's own, which in inference reads its linears' weights past their forward."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def encoder():
    torch.manual_seed(0)
    return Encoder().eval()


def patched_encoder():
    layer = smt_ext.LayerPlan(shape=(64, 32), block_size=16, blocks=((0, 0), (3, 1)))
    names = [f"encoder.layers.{i}.linear1" for i in range(2)]
    return smt_ext.patch(encoder(), smt_ext.BlockPlan(layers=dict.fromkeys(names, layer)))


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_computes_by_the_patched_linears_in_inference_too(padded):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(5) >= torch.tensor([[3], [5]]) if padded else None
    valid = slice(None) if padding is None else ~padding
    model = patched_encoder()
    in_place(model)
    with torch.no_grad():
        got = model(x, padding)[valid]
    smt_ext.sync_weights(model)
    model.train()
    wanted = model(x, padding)
    torch.testing.assert_close(got, wanted[valid])
    model.eval()
    (evaluated,) = torch.autograd.grad(model(x, padding)[valid].sum(), blocks_of(model)[:1])
    (trained,) = torch.autograd.grad(wanted[valid].sum(), blocks_of(model)[:1])
    torch.testing.assert_close(evaluated, trained)
    smt_ext.unpatch(model, restore=True)
    with torch.no_grad():
        assert torch.equal(model(x, padding)[valid], encoder()(x, padding)[valid])
    assert model.encoder.use_nested_tensor
    assert not any(len(m._forward_pre_hooks) for m in model.modules())


def test_a_copy_made_in_inference_mode_is_current_too():
    _, y = expected()
    with torch.inference_mode():
        twin = copy.deepcopy(patched())
        in_place(twin)
        assert torch.equal(twin(X), y)
    with torch.no_grad():
        assert torch.equal(twin(X), y)


@pytest.mark.parametrize("name", ["LBFGS", "AdamW", "Rprop"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_optimizers_that_evaluate_within_a_step_match_their_dense_twins(name, backend):
    settings = {"lr": 1, "max_iter": 8, "line_search_fn": "strong_wolfe"} if name == "LBFGS" else {}
    ends = []
    for sparse in (True, False):
        model = mlp(torch.float64)
        plan = smt_ext.BlockPlan(
            {
                "up_proj": smt_ext.LayerPlan(
                    (64, 96), 32, tuple((r, c) for r in (0, 1) for c in range(3))
                )
            }
        )
        if sparse:
            smt_ext.patch(model, plan)
        model.requires_grad_(False)
        trained = model.up_proj.blocks if sparse else model.up_proj.weight
        trained.requires_grad_(True)
        run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
        optimizer = getattr(torch.optim, name)([trained], **settings)

        def closure(run=run, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (run(X.double()) - 1).square().mean()
            loss.backward()
            return loss

        begin = closure().item()
        for _ in range(2):
            optimizer.step(closure)
        ends.append(closure().item())
    assert ends[1] < begin
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_a_foreign_step_inside_original_weights_is_refused_before_it_moves_anything():
    model = patched()
    optimizer = torch.optim.AdamW(blocks_of(model), lr=0.1)
    model(X).sum().backward()
    before = [blocks.detach().clone() for blocks in blocks_of(model)]
    with smt_ext.original_weights(model), pytest.raises(PatchError, match="original_weights"):
        optimizer.step()
    assert all(map(torch.equal, before, blocks_of(model)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_refuses_blocks_that_were_changed_by_hand(backend):
    torch._dynamo.reset()
    _, y = expected()
    model = patched()
    run = torch.compile(model, backend=backend, fullgraph=True)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            run(X)
            in_place(model)
            with pytest.raises(PatchError, match=r"gate_proj.*sync_weights"):
                run(X)
            smt_ext.sync_weights(model)
            now = run(X)
    assert not torch.equal(now, y)
    with torch.no_grad():
        torch.testing.assert_close(now, model(X))
    copied = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    torch.testing.assert_close(copied(X).detach(), now)
    torch._dynamo.reset()


def _sharded(rank, whole):
    model = stack()
    smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))
    if not whole:
        for layer in model.layers:
            fully_shard(layer)
    fully_shard(model)
    x = torch.randn(4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks_of_rank = blocks_of(model)
    losses = []
    for _ in range(3):
        losses.append(model(x).item())
        with torch.no_grad():
            for blocks in blocks_of_rank:
                blocks.mul_(0.5)
    return losses


@pytest.mark.parametrize("whole", [False, True])
def test_sharded_blocks_changed_by_hand_reach_the_next_forward(whole, tmp_path):
    model = stack()
    smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))
    x = torch.randn(4, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = []
    for _ in range(3):
        expected.append(model(x).item())
        in_place_half(model)
    for losses in run_ranks(_sharded, 2, tmp_path, whole):
        assert losses[1:] == pytest.approx(expected[1:], rel=1e-12)
        assert losses[0] == pytest.approx(expected[0], rel=1e-12)


@torch.no_grad()
def in_place_half(model):
    for blocks in blocks_of(model):
        blocks.mul_(0.5)


def test_exported_checkpoints_hold_the_change(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    smt_ext.patch(model, llama_plan(model))
    in_place(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smt_ext.export(model, tmp_path / "merged")
    name, module = next(iter(smt_ext.smt_modules(model).items()))
    saved = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(saved[:32, :32], module.original_blocks[0] * -1.5)


def test_blocks_changed_by_hand_reach_the_weight_though_the_step_is_skipped():
    model = patched()
    optimizer = smt_ext.SparseAdamW(model, lr=0.1)
    model(X).sum().backward()
    in_place(model)
    blocks_of(model)[0].grad.view(-1)[0] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for module in smt_ext.smt_modules(model).values():
        assert torch.equal(module.read_held_blocks(), module.blocks.detach())


def test_data_that_is_replaced_twice_is_noticed_wherever_it_lies():
    model = patched()
    (blocks, *_) = blocks_of(model)
    module = smt_ext.smt_modules(model)["gate_proj"]
    # Of two tensors the second may have the first one's memory: here it has.
    held = torch.empty_like(blocks)
    for value in (1.0, 2.0):
        blocks.data = held.detach()
        held.fill_(value)
        module.read_blocks()
    held.fill_(3.0)
    blocks.data = held.detach()
    assert torch.equal(module.read_blocks(), held)


@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "prune"])
def test_a_weight_that_is_computed_anew_is_refused(how):
    model = patched()
    kept = {n: v.clone() for n, v in model.state_dict().items() if n.startswith("down_proj")}
    if how == "parametrize":
        torch.nn.utils.parametrize.register_parametrization(
            model.gate_proj, "weight", torch.nn.Identity()
        )
    elif how == "prune":
        prune.random_unstructured(model.gate_proj, "weight", 0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(model.gate_proj)
    optimizer = torch.optim.SGD(blocks_of(model), lr=0.1)
    for call in (lambda: model(X), optimizer.step, lambda: smt_ext.unpatch(model)):
        with pytest.raises(PatchError, match=r"'gate_proj' was parametrized.*Remove that"):
            call()
    for name, value in kept.items():
        assert torch.equal(model.state_dict(keep_vars=True)[name], value)
    plain = mlp()
    prune.random_unstructured(plain.gate_proj, "weight", 0.5)
    with pytest.raises(PatchError, match="'gate_proj' is computed from other parameters"):
        smt_ext.patch(plain, mlp_plan())


@pytest.mark.parametrize("make", [torch.optim.SGD, smt_ext.SparseAdamW])
def test_a_weight_replaced_past_the_module_is_refused_by_any_optimizer(make):
    """As accelerate's hooks do; forward takes it for one that functional_call lends."""
    model = patched()
    model.down_proj._parameters["weight"] = nn.Parameter(model.down_proj.weight.clone(), False)
    optimizer = make(blocks_of(model), lr=0.1)
    model(X).sum().backward()
    with pytest.raises(PatchError, match=r"'down_proj' was replaced in module\._parameters"):
        optimizer.step()
    model.down_proj.weight = model.down_proj.weight
    model(X).sum().backward()
    optimizer.step()
    assert torch.equal(model.down_proj.read_held_blocks(), model.down_proj.blocks)


@pytest.mark.parametrize("end", ["unpatched", "replaced"])
def test_blocks_that_no_layer_owns_are_refused_by_any_optimizer(end):
    model = patched()
    model(X).sum().backward()
    optimizer = torch.optim.AdamW(blocks_of(model), lr=0.1)
    if end == "replaced":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        smt_ext.unpatch(model)
        smt_ext.patch(model, mlp_plan())
    with pytest.raises(PatchError, match="would train nothing"):
        optimizer.step()
