"""What an estimate says of itself, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import smt_ext
from models import tiny_llama
from smt_ext import DataError, PlanError
from smt_ext.cli import entry as cli
from smt_ext.estimation.meta_model import METHODS, PRESETS, meta_model, model_config
from smt_ext.estimation.table import estimate, parse_bytes
from smt_ext.estimation.trace import trace_step
from smt_ext.planning.make_plan import make_plan

SMALL = {"budget": "20%", "block_size": 32, "length": 64, "batch": 2}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_presets_have_the_published_size(name: str, parameters: int) -> None:
    model = meta_model(model_config(name), torch.bfloat16)
    assert name in PRESETS
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("batch", "method"), [(1, "full"), (3, "lora"), (1, "smt")])
def test_the_largest_batch_fits_and_the_next_does_not(batch: int, method: str) -> None:
    config = tiny_llama().config
    memory = 30_000_000
    found = estimate(config, memory=memory, methods=[method], **{**SMALL, "batch": batch})
    largest = found[method].largest_batch
    assert largest is not None
    assert largest > 3
    peaks = [
        estimate(config, methods=[method], **{**SMALL, "batch": largest + more})[method].peak
        for more in (0, 1)
    ]
    assert peaks[0] <= memory < peaks[1]


def test_no_batch_fits() -> None:
    found = estimate(tiny_llama().config, memory="100KB", methods=["smt"], **SMALL)
    assert found["smt"].largest_batch == 0
    assert "not even one sequence fits; try shorter ones, or gradient checkpointing" in str(found)


def test_the_methods_differ_as_they_should() -> None:
    config = tiny_llama(tie_word_embeddings=False).config
    found = estimate(config, **SMALL)
    full, master, smt = found["full"], found["full-master"], found["smt"]
    assert full.gradients == 2 * found.parameters
    assert full.optimizer == 2 * 2 * found.parameters
    assert master.optimizer == 3 * 4 * found.parameters
    # Four bytes each for the gradient and for two moments of what trains, padding included.
    assert smt.gradients >= 4 * smt.trainable
    assert smt.optimizer == 2 * smt.gradients
    assert smt.saved["linear inputs"] < full.saved["linear inputs"]
    assert found["lora"].trainable == pytest.approx(smt.trainable, rel=0.1)
    for entry in found.methods:
        assert entry.peak == sum(entry.at_peak.values())
        assert entry.peak >= entry.weights + entry.optimizer + entry.gradients


def test_saved_columns_are_those_of_the_plan() -> None:
    model = tiny_llama(torch.bfloat16)
    plan = make_plan(model, None, budget="20%", block_size=32, metric="random")
    found = estimate(model.config, plan=plan, methods=["smt"], batch=2, length=64)
    smt_ext.patch(model, plan)
    assert (
        found["smt"].saved["linear inputs"] == 2 * 64 * smt_ext.status(model).saved_bytes_per_token
    )


def test_a_4_bit_base_shrinks_the_weights_alone() -> None:
    config = tiny_llama(vocab_size=64, num_hidden_layers=4).config
    found = estimate(config, methods=["smt", "smt-4bit", "lora", "qlora"], **SMALL)
    linears = sum(
        layer.weight.numel()
        for name, layer in meta_model(config, torch.bfloat16).named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    for plain, packed in (("smt", "smt-4bit"), ("lora", "qlora")):
        a, b = found[plain], found[packed]
        assert (a.gradients, a.optimizer, a.trainable) == (b.gradients, b.optimizer, b.trainable)
        assert a.saved.get("linear inputs") == b.saved.get("linear inputs")
        # Four bits a weight, a byte for 64, float32 for 256 of these, and small tables.
        saved = a.weights - b.weights
        assert saved < linears * (2 - 0.5 - 1 / 64) < saved + linears / 500 + 40 * 2048


def test_checkpointing_keeps_less_and_recomputes() -> None:
    config = tiny_llama(num_hidden_layers=6).config
    plain = estimate(config, methods=["full"], **SMALL)["full"]
    less = estimate(config, methods=["full"], gradient_checkpointing=True, **SMALL)["full"]
    assert less.saved_bytes < plain.saved_bytes / 2
    assert less.peak < plain.peak
    assert less.gradients == plain.gradients


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, pad_token_id=0),
        transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2),
        transformers.GPTJConfig(n_embd=64, n_layer=1, n_head=2, rotary_dim=16),
        transformers.GPTNeoConfig(
            hidden_size=64, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
        ),
        transformers.CodeGenConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_look_for_padding_or_know_their_own_attention_alone(config) -> None:
    trace = trace_step(meta_model(config, torch.float32), 1, 8)
    assert trace.levels.max() > 0
    assert trace.gradients == sum(p.nbytes for p in meta_model(config, torch.float32).parameters())


def test_without_a_plan_it_is_that_of_the_recommended_preset() -> None:
    config = tiny_llama().config
    model = tiny_llama(torch.bfloat16)
    plan = make_plan(model, None, budget="20%", block_size=32, preset="recommended")
    assert estimate(config, methods=["smt"], **SMALL) == estimate(
        config, methods=["smt"], plan=plan, **SMALL
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("80gb", 80 * 10**9),
        ("1.5 GB", 1.5e9),
    ],
)
def test_sizes(text: str, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"memory": "much"},
            DataError,
            "memory is 'much', expected a number with its unit, such as",
        ),
        ({"memory": "24iB"}, DataError, "memory is '24iB'"),
        ({"memory": "infGB"}, DataError, "memory is 'infGB'"),
        ({"memory": "24"}, DataError, "memory is '24', expected a number with its unit"),
        ({"batch": 0}, DataError, "batch is 0, expected at least 1"),
        ({"length": 1000}, DataError, "length is 1000, and the context of llama is 128 tokens"),
        ({"dtype": "int8"}, DataError, "dtype is 'int8', expected bf16, fp16, fp32"),
        ({"methods": ["magic"]}, DataError, f"expected some of {', '.join(METHODS)}"),
        ({"budget": "1e-6%"}, PlanError, "buys no block"),
    ],
)
def test_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(tiny_llama().config, **{**SMALL, "methods": ["smt"], **arguments})  # type: ignore[arg-type]


def test_a_plan_of_another_model_is_refused() -> None:
    plan = make_plan(
        tiny_llama(hidden_size=128), None, budget="20%", block_size=32, metric="random"
    )
    with pytest.raises(PlanError, match="the plan was made for"):
        estimate(tiny_llama().config, plan=plan, length=64)


def test_a_configuration_stays_as_it_was() -> None:
    config = tiny_llama().config
    before, attention = config.to_dict(), config._attn_implementation
    estimate(config, methods=["smt"], **SMALL)
    assert (config.to_dict(), config._attn_implementation) == (before, attention)


def test_a_model_that_wants_values_is_refused_by_name() -> None:
    """Its own code raises what it likes: MPT an AttributeError, of the mask that it was not given."""
    config = transformers.MptConfig(
        d_model=32, n_heads=2, n_layers=1, vocab_size=64, max_seq_len=64
    )
    with pytest.raises(DataError, match="MptForCausalLM cannot be run from shapes alone"):
        estimate(config, methods=["smt"], length=16, budget="20%", block_size=16)


def test_public_patch_still_refuses_the_meta_device() -> None:
    model = meta_model(tiny_llama().config, torch.float32)
    plan = make_plan(model, None, budget="20%", block_size=32, metric="random")
    with pytest.raises(smt_ext.PatchError, match="meta device and has no values"):
        smt_ext.patch(model, plan)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    command = ["estimate", "--model", str(tmp_path), "--budget", "20%", "--block-size", "32",
               "--batch", "2", "--seq", "64"]  # fmt: skip
    assert cli.main([*command, "--gpu", "24GB"]) == 0
    out = capsys.readouterr().out
    for text in (
        "LoRA",
        "DoRA",
        "QLoRA",
        "SMT, 4-bit",
        "linear inputs",
        "logits and loss",
        "largest batch",
        "plan of SMT:",
    ):
        assert text in out
    several = ["--methods", "smt,full", "--targets", "q,v", "--budget", "0.01", "--json"]
    assert cli.main([*command, *several]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["method"] for entry in found["methods"]] == ["smt", "full"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["method"] for entry in found["methods"]] == list(METHODS)


def test_command_with_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--model", "llama-7b", "--seq", "9999"]) == 2
    assert "context of llama is 2048" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_no_word_of_libraries_that_are_not_asked_for(tmp_path: Path) -> None:
    # PEFT imports bitsandbytes, once a process, which warns on a machine without a GPU.
    tiny_llama().config.save_pretrained(tmp_path)
    command = [
        "-m",
        "smt_ext.cli",
        "estimate",
        "--model",
        tmp_path,
        "--seq",
        "8",
        "--methods",
        "lora",
    ]
    done = subprocess.run([sys.executable, *command, "--block-size", "16", "--budget", "5%"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "bitsandbytes" not in done.stderr
    assert "Failed to load" not in done.stderr


@pytest.mark.parametrize("change", [{"hidden_act": "none"}, {"num_attention_heads": 7}])
def test_a_configuration_that_cannot_be_is_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert cli.main(["estimate", "--model", str(tmp_path), "--seq", "16"]) == 2
    assert capsys.readouterr().err.startswith("smt-ext: cannot ")
