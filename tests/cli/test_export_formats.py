"""`smt-ext export --format`: every format gives the trained model back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run
from peft import PeftModel
from transformers import AutoModelForCausalLM

import smt_ext


@pytest.fixture
def trained(arguments: list[str], tmp_path: Path) -> Path:
    assert run(*arguments, "--steps", "2", "--targets", "all-linear") == 0
    return tmp_path / "run" / "blocks"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


def test_each_format(
    trained: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str | Path = checkpoint) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    base = ["--model", checkpoint, "--blocks", str(trained)]
    want = logits(smt_ext.load_blocks(load(), trained))
    assert not torch.allclose(logits(load()), want)

    for extra in (
        ["--format", "hf"],
        ["--format", "delta"],
        ["--format", "peft-lora"],
        ["--format", "peft-lora", "--uniform-rank"],
    ):
        out = tmp_path / "_".join(extra)
        assert run("export", *base, "--output", str(out), *extra) == 0
        assert f"written to {out}: " in capsys.readouterr().out
        if extra[1] == "hf":
            assert torch.equal(logits(load(out)), want)
        elif extra[1] == "delta":
            assert torch.equal(logits(smt_ext.apply_delta(load(), out)), want)
        else:
            got = logits(PeftModel.from_pretrained(load(), str(out)))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_option_of_another_format_is_refused(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run("export", "--model", checkpoint, "--blocks", "b", "--output", str(tmp_path / "o"),
                 "--uniform-rank")  # fmt: skip
    assert status == 2
    assert "--uniform-rank is for --format peft-lora" in capsys.readouterr().err
