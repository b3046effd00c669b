"""``smt-ext train --load_in_4bit`` and ``_8bit``: train, resume, export; torchao in load_model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import smt_ext
from models import save_checkpoint
from smt_ext.checkpoint.blocks import load_plan, read_blocks_info
from smt_ext.cli import main
from smt_ext.hf.loading import load_base, load_model
from smt_ext.hf.word_problems import make_problems
from smt_ext.quantization import packed_weight

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}


@pytest.mark.parametrize("bits", [4, 8])
def test_train_resume_export(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = str(save_checkpoint(tmp_path / "base", **SIZES))
    rows = [r for r in make_problems(200, split="train") if len(r["instruction"]) < 85][:16]
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model": base, "data": data, "output": run, f"load_in_{bits}bit": "true",
        "block_size": 32, "budget": "6 blocks", "targets": "q,k,v,o", "plan_batches": 1,
        "per_device_train_batch_size": 4, "max_steps": 2, "lr": 1e-2, "precision": "fp32",
        "max_length": 120, "save_strategy": "steps", "save_steps": 2, "report_to": "none",
        "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    pairs = ((f"--{name}", str(value)) for name, value in flags.items())
    assert main(["train", *(text for pair in pairs for text in pair)]) == 0
    assert main(["train", "--resume", str(run), "--max_steps", "3"]) == 0
    assert main(["export", "--model", base, "--blocks", str(run), "--output", f"{run}-hf"]) == 0

    card = (run / "README.md").read_text()  # says how to load the blocks, and is right
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(code.replace("this folder, or its name on the hub", str(run)), scope := {})
    assert smt_ext.smt_modules(scope["model"])

    info = read_blocks_info(run)
    trained = smt_ext.load_blocks(load_base(base, info), run)
    modules = smt_ext.smt_modules(trained)
    assert sum(len(module.blocks) for module in modules.values()) == load_plan(run).num_blocks
    merged = transformers.AutoModelForCausalLM.from_pretrained(f"{run}-hf", dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    changed = 0
    for name, module in modules.items():
        weight = merged.get_submodule(name).weight
        assert torch.equal(weight, module.dequantized())
        changed += int((weight != packed_weight(module).dequantize()).sum())  # type: ignore[union-attr]
    assert changed > 1000


def test_four_bits_compute_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    """Which is float32 where transformers is told none: many times slower on GPUs."""
    pytest.importorskip("bitsandbytes")
    from smt_ext.cli.train import build, parse

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 2 =", "completion": " 3"}\n')
    base = str(save_checkpoint(tmp_path / "base", **SIZES))
    flags = {
        "model": base, "data": data, "output": tmp_path / "run", "load_in_4bit": "true",
        "precision": "bf16", "use_cpu": "true", "report_to": "none",
    }  # fmt: skip
    made = build(parse([f"--{name}={value}" for name, value in flags.items()]))
    layers = {m.compute_dtype for m in made.model.modules() if hasattr(m, "compute_dtype")}
    assert layers == {torch.bfloat16}


def test_blocks_of_a_loop_of_ones_own_are_exported_from_a_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = str(save_checkpoint(tmp_path / "base", **SIZES))
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings = {"quantization_config": config, "device_map": "cpu"}
    model = load_model(base, torch.float32, **settings)
    plan = smt_ext.make_plan(
        model, None, budget="4 blocks", block_size=32, targets="qkv", metric="random"
    )
    smt_ext.patch(model, plan)
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.mul_(1.5)
    blocks, out = str(tmp_path / "blocks"), str(tmp_path / "hf")
    smt_ext.save_blocks(model, blocks)
    assert main(["export", "--model", base, "--blocks", blocks, "--output", out]) == 0


def test_eval_of_a_quantised_base_alone(tmp_path: Path, monkeypatch) -> None:
    """Saved by transformers, whose configuration says how it was quantised."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("lm_eval")
    from smt_ext.cli import eval as command

    base, seen = save_checkpoint(tmp_path / "base", **SIZES), []

    def evaluate(model, *_, **__):
        seen.append(packed_weight(model.get_submodule("model.layers.0.self_attn.v_proj")))
        return {}

    monkeypatch.setattr(command, "evaluate", evaluate)
    for bits, kind in ((4, "bitsandbytes NF4"), (8, "bitsandbytes int8")):
        config = transformers.BitsAndBytesConfig(
            **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4"
        )
        folder = shutil.copytree(base, tmp_path / str(bits))
        load_model(str(base), torch.float32, quantization_config=config).save_pretrained(folder)
        flags = ["--tasks", "x", "--model", str(folder), "--output", str(tmp_path / "out")]
        assert main(["eval", *flags]) == 0
        assert seen.pop().scheme.title == kind


def test_torchaos_configuration(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    base = str(save_checkpoint(tmp_path / "base", **SIZES))
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = load_model(base, torch.float32, quantization_config=config)
    plan = smt_ext.make_plan(
        model, None, budget="4 blocks", block_size=32, targets="qkv", metric="random"
    )
    smt_ext.patch(model, plan)
    assert all(packed_weight(m) is not None for m in smt_ext.smt_modules(model).values())
    model.train()
    ids = torch.randint(0, 90, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(m.blocks.grad.abs().max() > 0 for m in smt_ext.smt_modules(model).values())
