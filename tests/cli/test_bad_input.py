"""What a user gets wrong is named, with the way out, and exits with status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import run


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("smt-ext: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "/no/such/folder"], "model '/no/such/folder' does not exist"),
        (["--data", "/no/such.jsonl"], "cannot read '/no/such.jsonl'"),
        (["--budget", "0.00001%"], "budget"),
        (["--budget", "lots"], "budget"),
        (["--block-size", "8"], "block_size is 8, expected 16 to 512"),
        (["--targets", "nothing_like_this"], "nothing_like_this"),
        (["--metric", "magic"], "metric is 'magic', expected one of"),
        (["--lr", "-1"], "'lr' is -1.0, expected more than 0"),
        (["--steps", "0"], "'steps' is 0, expected at least 1"),
        (["--warmup", "2"], "'warmup' is 2.0, expected 0 to 1"),
        (["--max-length", "10"], "more than max_length = 10"),
        (["--plan", "/no/plan.json"], "cannot load a block plan from '/no/plan.json'"),
        (["--config", "/no/settings.yaml"], "cannot read the settings in '/no/settings.yaml'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings(
    arguments: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *arguments, *extra)


def test_unknown_setting_names_the_closest(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("batchsize: 3\n")
    assert "'batchsize'; did you mean 'batch_size'?" in error_of(
        capsys, *arguments, "--config", str(config)
    )
    config.write_text("packing: 3\n")
    assert "'packing' is 3, expected bool" in error_of(capsys, *arguments, "--config", str(config))
    config.write_text("template: fancy\n")
    message = error_of(capsys, *arguments, "--config", str(config))
    assert "'template' is 'fancy', expected 'plain', 'alpaca', 'chat'" in message


def test_a_bad_row_is_named_by_file_and_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"})
    for bad, message in (
        ("{", "not valid JSON"),
        ('{"question": "x"}', "has the fields 'question'"),
        ('{"instruction": "x", "output": 3}', "'output' is a int, expected text"),
    ):
        data.write_text(f"{good}\n\n{bad}\n")
        error = error_of(capsys, *arguments, "--data", str(data))
        assert f"{data}:3: {message}" in error


def test_a_plan_for_another_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from models import mlp_plan

    mlp_plan().save(tmp_path / "plan.json")
    error = error_of(capsys, *arguments, "--plan", str(tmp_path / "plan.json"))
    assert "no such module" in error


def test_a_context_that_is_too_short(
    arguments: list[str], rows: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 300, "completion": "y"}) + "\n")
    error = error_of(capsys, *arguments, "--data", str(data), "--max-length", "1000")
    assert "the model's context is 256" in error


def test_long_rows_are_skipped_on_request(
    arguments: list[str], rows: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mixed.jsonl"
    long = json.dumps({"prompt": "x" * 300, "completion": "y"})
    data.write_text(Path(rows[0]).read_text() + long + "\n")
    assert run(*arguments, "--data", str(data), "--too-long", "skip") == 0
    assert "skipped 1 of 41 rows" in capsys.readouterr().out


def test_score_without_held_out_rows(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--eval")
    without = arguments[:at] + arguments[at + 2 :]
    assert "needs held-out rows" in error_of(capsys, *without, "--score", "exact")


def test_traceback_on_request(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        run("--traceback", *arguments, "--steps", "0")


def test_damaged_blocks(
    arguments: list[str], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    blocks = tmp_path / "run" / "blocks"
    file = blocks / "blocks.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    error = error_of(
        capsys, "export", "--model", checkpoint, "--blocks", str(blocks), "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert "is damaged or cut off: its sha256 is" in error
    assert not (tmp_path / "out").exists()
    nothing = ("export", "--model", checkpoint, "--output", "x", "--blocks")
    error = error_of(capsys, *nothing, str(tmp_path))
    assert "Expected a directory that smt_ext saved" in error
    assert "Do you mean" not in error
    error = error_of(capsys, *nothing, str(tmp_path / "run"))  # one folder too high
    assert f"Do you mean {str(blocks)!r}?" in error


def test_nan_gradients_skip_the_step_and_are_reported(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from smt_ext.loss import AnswerLoss

    calls = []
    plain = AnswerLoss.answer_logits

    def sometimes_nan(self, batch):
        logits, labels = plain(self, batch)
        calls.append(1)
        return (logits * float("nan") if self.model.training and len(calls) % 2 else logits), labels

    monkeypatch.setattr(AnswerLoss, "answer_logits", sometimes_nan)
    assert run(*arguments, "--metric", "weight") == 0
    assert "3 skipped: inf or NaN gradients" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["skipped_steps"] == 3
    assert results["after"]["loss"] < results["before"]["loss"]
