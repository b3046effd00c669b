"""An exported checkpoint is an ordinary one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import smt_ext
from models import llama_plan, mlp, mlp_plan, tiny_llama, token_batch
from smt_ext import PatchError

LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM, GenerationConfig
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.save((model(input_ids=ids).logits, model.dtype), folder + ".logits")
assert "smt_ext" not in sys.modules
"""


def test_loads_without_smt_ext(tmp_path):
    ids = token_batch(3)["input_ids"]
    made = {}
    for dtype, tied in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        folder = tmp_path / f"{dtype}-{tied}"
        tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        # As bases have it, with the end of text that a trainer took from its tokenizer.
        model.generation_config.temperature, model.generation_config.eos_token_id = 0.6, [2, 3]
        smt_ext.patch(model, llama_plan(model))
        optimizer = smt_ext.SparseAdamW(model, lr=1e-2)
        model(**token_batch()).loss.backward()
        optimizer.step()
        smt_ext.export(model, folder)
        for path in (p for p in folder.iterdir() if p.name != "smt_files.json"):
            assert b"smt" not in path.read_bytes()[:20_000], path.name
        model.eval()
        with torch.no_grad():
            made[str(folder)] = model(input_ids=ids).logits, dtype
        # Training goes on with the same model.
        model(**token_batch(1)).loss.backward()
        optimizer.step()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(ids.tolist()), *made],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, (logits, dtype) in made.items():
        got, loaded_dtype = torch.load(f"{folder}.logits")
        assert loaded_dtype == dtype, folder
        assert torch.equal(got, logits), folder
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.temperature, generation.eos_token_id) == (0.6, [2, 3])


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(PatchError, match="has no SMT layer"):
        smt_ext.export(tiny_llama(), tmp_path / "model")
    with pytest.raises(PatchError, match=r"MLP has no save_pretrained.*torch.save"):
        smt_ext.export(smt_ext.patch(mlp(), mlp_plan()), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_format_that_is_not_there_and_an_option_of_another(tmp_path):
    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model))
    with pytest.raises(ValueError, match=r"'gguf', expected one of 'hf', 'peft-lora', 'delta'"):
        smt_ext.export(model, tmp_path / "out", "gguf")
    with pytest.raises(TypeError, match="uniform_rank"):
        smt_ext.export(model, tmp_path / "out", "delta", uniform_rank=True)
    assert not (tmp_path / "out").exists()


def test_a_compiled_models_export_has_the_models_own_names(tmp_path):
    model = tiny_llama()
    model.model.register_buffer("blocks", torch.ones(2))
    smt_ext.patch(model, llama_plan(model))
    smt_ext.export(torch.compile(model), tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name]
    assert [name for name in names if name.endswith("blocks")] == ["model.blocks"]
