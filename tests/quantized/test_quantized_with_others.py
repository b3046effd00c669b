"""A quantised base under transformers, checkpointing, compile, DDP and FSDP2; what is refused."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import smt_ext
from models import llama_plan, save_checkpoint, token_batch
from quantized_models import SCHEMES, needs, quant_llama, quant_mlp, quant_plan
from smt_ext.errors import PatchError, PlanError

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _library(request):
    if hasattr(request.node, "callspec") and "scheme" in request.node.callspec.params:
        pytest.importorskip(needs(request.node.callspec.params["scheme"]))


def patched(scheme):
    model = quant_llama(scheme)
    return smt_ext.patch(model, llama_plan(model)).train()


def gradients(model):
    return {n: m.blocks.grad for n, m in smt_ext.smt_modules(model).items()}


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao"])
def test_models_that_transformers_has_quantised_train(kind, tmp_path):
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    folder = save_checkpoint(tmp_path / "base", **sizes)
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=kind == "bnb-4bit",
            load_in_8bit=kind == "bnb-8bit",
            bnb_4bit_quant_type="nf4",
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    plan = smt_ext.make_plan(
        model, [token_batch(0) | {"input_ids": token_batch(0)["input_ids"] % 90}],
        budget="6 blocks", block_size=32, targets="qkv", progress=False,
    )  # fmt: skip
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
    ids = token_batch(1)["input_ids"] % 90
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    smt_ext.export(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    name, module = next(iter(smt_ext.smt_modules(model).items()))
    weight = merged.get_submodule(name).weight
    assert torch.equal(weight, module.dequantized(weight.dtype))


@each_scheme
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(scheme, reentrant):
    plain, checkpointed = patched(scheme), patched(scheme)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(**token_batch()).loss.backward()
    for name, grad in gradients(plain).items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(gradients(checkpointed)[name], grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scheme", ["nf4", "bnb-int8"])
def test_compiled_models_give_the_same_gradients(scheme):
    torch._dynamo.reset()
    eager, compiled = (smt_ext.patch(quant_mlp(scheme), quant_plan()).train() for _ in range(2))
    run = torch.compile(compiled, backend="aot_eager")
    x = torch.randn(6, 128)
    eager(x).square().sum().backward()
    run(x).square().sum().backward()
    for name, grad in gradients(eager).items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(gradients(compiled)[name], grad, rtol=1e-4, atol=1e-5)


def test_a_forward_without_gradients_does_not_spoil_training():
    pytest.importorskip("bitsandbytes")
    model = patched("nf4").eval()
    with torch.no_grad():
        model(**token_batch())
    model.train()
    model(**token_batch()).loss.backward()
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())


def test_rows_that_bitsandbytes_reads_wrongly_on_cpus_are_refused():
    pytest.importorskip("bitsandbytes")
    from quantized_models import quantize

    model = nn.Module()
    model.v_proj = quantize(nn.Linear(96, 64), "nf4")
    plan = smt_ext.BlockPlan({"v_proj": smt_ext.LayerPlan((64, 96), 32, ((0, 0),))})
    with pytest.raises(PlanError, match=r"rows of 96 values.*wrong scales on the CPU"):
        smt_ext.patch(model, plan)


def foreign(module_name, class_name):
    """A class that says it is another library's."""
    cls = type(class_name, (nn.Module,), {"__module__": module_name})
    sys.modules.setdefault(module_name, types.ModuleType(module_name))
    return cls()


@pytest.mark.parametrize(
    ("module", "name", "library"),
    [
        ("hqq.core.quantize", "HQQLinear", "HQQ"),
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "GPTQ or AWQ"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", "AWQ"),
    ],
)
def test_other_quantisers_are_refused_by_name(module, name, library):
    model = nn.Module()
    model.embed = nn.Embedding(4, 64)
    model.v_proj = foreign(module, name)
    plan = smt_ext.BlockPlan({"v_proj": smt_ext.LayerPlan((64, 64), 32, ((0, 0),))})
    with pytest.raises(PlanError, match=f"'v_proj' is a {name}, quantized by {library}"):
        smt_ext.patch(model, plan)
    for targets in ("v", "all-linear"):
        with pytest.raises(PlanError, match=f"'v_proj' is a {name}, quantized by {library}"):
            smt_ext.make_plan(model, None, budget="1 blocks", targets=targets, metric="random")


def test_layers_that_cannot_train_beside_others_are_named(caplog):
    model = nn.Module()
    model.gate = nn.Linear(64, 64)
    model.v_proj = foreign("hqq.core.quantize", "HQQLinear")
    plan = smt_ext.make_plan(
        model, None, budget="1 blocks", block_size=32, targets="all-linear", metric="random"
    )
    assert plan.layers.keys() == {"gate"}
    said = (
        "1 layers that target 'all-linear' matches cannot train and are left out: 'v_proj' is a HQQ"
    )
    assert said in caplog.text


def test_half_precision_blocks_are_refused():
    pytest.importorskip("bitsandbytes")
    model = quant_mlp("nf4")
    with pytest.raises(PatchError, match="only copy of its trained values"):
        smt_ext.patch(model, quant_plan(), block_dtype=torch.bfloat16)
    assert not smt_ext.smt_modules(model)


def _ddp_rank(rank, folder, schemes):
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for scheme in schemes:
        model = patched(scheme)
        wrapped = DistributedDataParallel(model)
        wrapped(**token_batch(rank)).loss.backward()
        expected = patched(scheme)
        for seed in range(2):
            (expected(**token_batch(seed)).loss / 2).backward()
        for name, grad in gradients(expected).items():
            torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-7)
        smt_ext.SparseAdamW(model, lr=1e-2).step()
        dist.barrier()

    from torch.distributed.fsdp import fully_shard

    def shard_then_patch(scheme):
        model = quant_llama(scheme)
        plan = llama_plan(model)
        smt_ext.patch(fully_shard(model), plan)

    def patch_then_shard(scheme):
        smt_ext.SparseAdamW(fully_shard(patched(scheme)), lr=1e-2)

    found = []
    for scheme in schemes:
        for way in (shard_then_patch, patch_then_shard):
            if scheme.startswith("torchao"):
                continue  # which fully_shard itself cannot cut
            try:
                way(scheme)
                found.append(f"accepted by {way.__name__}")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    (folder / f"fsdp{rank}").write_text("\n".join(found))
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    schemes = [s for s in SCHEMES if find_spec(needs(s)) is not None]
    torch.multiprocessing.spawn(_ddp_rank, (tmp_path, schemes), nprocs=2)
    for rank in range(2):
        for text in (tmp_path / f"fsdp{rank}").read_text().splitlines():
            assert text.startswith(("PatchError", "PlanError")), text
            assert "quantised bases do not support" in text


@each_scheme
def test_a_trainer_shards_no_quantised_base(scheme, tmp_path):
    import transformers

    class Trainer(smt_ext.SMTMixin, transformers.Trainer):
        pass

    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    rows = [{name: values[0] for name, values in token_batch().items()}]
    trainer = Trainer(quant_llama(scheme), args, train_dataset=rows)
    trainer.is_fsdp_enabled = True
    with pytest.raises(PatchError, match="is quantised, and FSDP would shard it"):
        trainer.train()


def test_an_int8_parameter_that_was_made_anew_is_named():
    """As fully_shard does."""
    pytest.importorskip("bitsandbytes")
    model = smt_ext.patch(quant_mlp("bnb-int8"), quant_plan())
    model.up_proj.weight = nn.Parameter(model.up_proj.weight.data, requires_grad=False)
    with pytest.raises(PatchError, match="holds no quantised weight any more"):
        model(torch.randn(6, 128))


def test_what_ddp_leaves_alone_is_as_before_after_unpatching():
    pytest.importorskip("torchao")
    model = patched("torchao-int8")
    assert len(model._ddp_params_and_buffers_to_ignore) == 14
    smt_ext.unpatch(model)
    assert not model._ddp_params_and_buffers_to_ignore
