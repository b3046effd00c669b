"""What leaves a model on a quantised base, and what may be put onto which base."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

import smt_ext
from models import llama_plan, token_batch
from quantized_models import SCHEMES, needs, quant_llama
from smt_ext.checkpoint.artifact import sealed
from smt_ext.checkpoint.delta import apply_delta
from smt_ext.errors import CheckpointError, PatchError
from smt_ext.nn.quantized import SMTQuantizedLinear
from smt_ext.quantization import packed_weight

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _library(request):
    if hasattr(request.node, "callspec") and "scheme" in request.node.callspec.params:
        pytest.importorskip(needs(request.node.callspec.params["scheme"]))


def trained(scheme, dtype=torch.float32):
    model = quant_llama(scheme, dtype)
    smt_ext.patch(model, llama_plan(model))
    optimizer = smt_ext.SparseAdamW(model, lr=5e-2)
    for step in range(2):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(token_batch(9)["input_ids"]).logits


def plain_weight(linear):
    packed = packed_weight(linear)
    return linear.weight.detach().clone() if packed is None else packed.dequantize()


@each_scheme
def test_blocks_go_onto_the_same_quantised_base(scheme, tmp_path):
    model = trained(scheme)
    expected = logits(model)
    smt_ext.save_blocks(model, tmp_path / "blocks")
    other = smt_ext.load_blocks(quant_llama(scheme).eval(), tmp_path / "blocks")
    assert all(isinstance(m, SMTQuantizedLinear) for m in smt_ext.smt_modules(other).values())
    assert torch.equal(logits(other), expected)


def test_blocks_are_tied_to_packed_bytes_and_state(tmp_path):
    pytest.importorskip("bitsandbytes")
    smt_ext.save_blocks(trained("nf4"), tmp_path / "blocks")
    for change in ("byte", "scale"):
        base = quant_llama("nf4")
        weight = base.model.layers[1].self_attn.v_proj.weight
        # Rows 32 to 63, columns 32 to 63: in no block, so that the blocks' own values stay.
        if change == "byte":
            weight.data[(40 * 128 + 40) // 2] ^= 1
        else:
            weight.quant_state.absmax[(40 * 128 + 64) // 64 - 1] *= 2
        with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_proj.*other values"):
            smt_ext.load_blocks(base, tmp_path / "blocks")
        assert not smt_ext.smt_modules(base)


@each_scheme
def test_another_base_is_refused_unless_asked_for(scheme, tmp_path):
    model = trained(scheme)
    there = {name: m.packed.dequantize() for name, m in smt_ext.smt_modules(model).items()}
    smt_ext.save_blocks(model, tmp_path / "blocks")
    others = [s for s in ("nf4", "bnb-int8") if s != scheme] + [None]
    for other in others:
        base = quant_llama(other) if other else quant_llama("nf4", torch.float32)
        if other is None:
            from models import tiny_llama

            base = tiny_llama(hidden_size=128, intermediate_size=192, num_key_value_heads=4)
        with pytest.raises(CheckpointError, match=r"trained on a base in .*strict_base=False"):
            smt_ext.load_blocks(base, tmp_path / "blocks")
        assert not smt_ext.smt_modules(base)
        here = {name: plain_weight(base.get_submodule(name)) for name in there}
        with pytest.warns(UserWarning, match="trained on a base in") as warned:
            smt_ext.load_blocks(base, tmp_path / "blocks", strict_base=False)
        said = re.search(r"differ from those of training by ([\d.]+)%", str(warned[0].message))
        error = sum((here[name] - there[name]).square().sum() for name in there)
        whole = sum(weight.square().sum() for weight in there.values())
        assert said is not None
        assert float(said[1]) / 100 == pytest.approx(
            float((error / whole).sqrt()), rel=0.3, abs=1e-3
        )
        assert torch.isfinite(logits(base)).all()


def save_with(entry, folder):
    """Blocks trained on NF4, ``entry`` in place of each layer's sample; the first layer's name."""
    smt_ext.save_blocks(trained("nf4"), folder)
    info = json.loads((folder / "smt_blocks.json").read_text())
    info.pop("seal")
    for base in info["base"].values():
        del base["sample"]
        base.update(entry)
    (folder / "smt_blocks.json").write_text(json.dumps(sealed(info)))
    return next(iter(info["base"]))


def test_blocks_without_samples_load_unmeasured(tmp_path):
    pytest.importorskip("bitsandbytes")
    save_with({}, tmp_path / "blocks")
    with pytest.warns(UserWarning, match="trained on a base in") as warned:
        smt_ext.load_blocks(quant_llama("bnb-int8"), tmp_path / "blocks", strict_base=False)
    assert "differ from" not in str(warned[0].message)


@pytest.mark.parametrize("sample", [[0.5], [float("nan")] * 64, [1e999] * 64, "x", None])
def test_a_bad_sample_of_a_base_is_named(sample, tmp_path):
    pytest.importorskip("bitsandbytes")
    name = save_with({"sample": sample}, tmp_path / "blocks")
    base = quant_llama("bnb-int8")
    with pytest.raises(CheckpointError, match=f"no usable sample of '{name}'"):
        smt_ext.load_blocks(base, tmp_path / "blocks", strict_base=False)
    assert not smt_ext.smt_modules(base)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
def test_export_is_an_ordinary_model_with_equal_logits(scheme, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model = trained(scheme, dtype)
    expected, before = logits(model), copy.deepcopy(model.config.to_dict())
    smt_ext.export(model, tmp_path / "merged", dtype=dtype)
    assert model.config.to_dict() == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    assert all(type(m) is torch.nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    # bitsandbytes' int8 layers that are not trained round their inputs to 8 bits in eval mode; its
    # 4-bit ones and torchao's multiply in another order.
    tolerance = 0.15 if scheme == "bnb-int8" else 1e-5 if dtype == torch.float32 else 3e-2
    if scheme == "torchao-int8":
        tolerance = max(tolerance, 3e-2)
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=tolerance * scale)
    modules = smt_ext.smt_modules(model)
    for name, module in modules.items():
        assert torch.equal(merged.get_submodule(name).weight, module.dequantized(dtype))


def test_a_layer_that_cannot_be_dequantised_is_not_exported_packed(tmp_path):
    model = trained("nf4", torch.float32)
    others = [
        n
        for n, m in model.named_modules()
        if n.endswith("_proj") and type(m).__name__ == "Linear4bit"
    ]
    name = others[0]
    model.get_submodule(
        name
    ).weight.quant_state.packing_format_for_cpu = True  # as inference leaves it
    with pytest.raises(PatchError, match=f"'{name}' was rewritten by bitsandbytes"):
        smt_ext.export(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double", "bnb-int8"])
def test_exact_lora_on_the_quantised_base(scheme, tmp_path):
    from peft import PeftModel

    model = trained(scheme).train()
    expected = logits(model)
    smt_ext.export(model, tmp_path / "lora", "peft-lora")
    lora = PeftModel.from_pretrained(quant_llama(scheme), tmp_path / "lora").train()
    assert not torch.equal(logits(quant_llama(scheme).train()), expected)
    torch.testing.assert_close(
        logits(lora), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_delta_is_against_the_dequantised_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = trained("nf4")
    exact = smt_ext.export(model, tmp_path / "delta", "delta")
    assert all(exact.values())
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "delta" / "delta.safetensors")
    for name, module in smt_ext.smt_modules(model).items():
        total = module.original_blocks.double() + tensors[f"{name}.delta"].double()
        assert torch.equal(total.float(), module.blocks)
    with pytest.raises(PatchError, match=r"cannot be added to .* cannot be written"):
        apply_delta(quant_llama("nf4"), tmp_path / "delta")


def test_named_sets_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    smt_ext.save_blocks(trained("nf4"), tmp_path / "blocks")
    base = quant_llama("nf4")
    with pytest.raises(PatchError, match="block set 'math' cannot be switched on"):
        smt_ext.load_blocks(base, tmp_path / "blocks", name="math")
    assert not smt_ext.smt_modules(base)


def test_a_training_state_resumes_to_the_bit(tmp_path):
    pytest.importorskip("bitsandbytes")

    def start():
        model = quant_llama("nf4")
        smt_ext.patch(model, llama_plan(model))
        return model, smt_ext.SparseAdamW(model, lr=1e-2)

    def step(model, optimizer, number):
        model(**token_batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, whole_optimizer = start()
    first, first_optimizer = start()
    for number in range(2):
        step(whole, whole_optimizer, number)
        step(first, first_optimizer, number)
    smt_ext.save_training_state(tmp_path / "state", first, first_optimizer)
    resumed, resumed_optimizer = start()
    smt_ext.load_training_state(tmp_path / "state", resumed, resumed_optimizer)
    for number in (2, 3):
        step(whole, whole_optimizer, number)
        step(resumed, resumed_optimizer, number)
    assert torch.equal(logits(whole), logits(resumed))
