"""Law 6 on the command line: stopped anywhere, even by kill -9, a run goes on bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import assert_same, evaluations, run, trained, wait_for_lines
from smt_ext.errors import Interrupted

COMMAND = [sys.executable, "-m", "smt_ext.cli"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_exactly(
    arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    flags = [*arguments, "--steps", "40", "--save-every", "7", "--eval-every", "3"]
    flags += ["--accumulate", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*flags, "--output", str(whole)) == 0
    process = subprocess.Popen(
        [*COMMAND, *flags, "--output", str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_lines(stopped / "metrics.jsonl", 10, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not (stopped / "blocks").exists(), "the run was over before the signal came"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"smt-ext train --resume {stopped}" in errors
    assert run("train", "--quiet", "--resume", str(stopped)) == 0
    assert_same(whole, stopped)
    assert evaluations(whole) == evaluations(stopped)
    assert [e["step"] for e in evaluations(whole)] == [*range(0, 40, 3), 40]


def test_resuming_a_finished_run_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments) == 0
    before = trained(tmp_path / "run")[1]
    path = tmp_path / "run" / "results.json"
    text = path.read_text()
    assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == 0
    assert trained(tmp_path / "run")[1] == before
    assert path.read_text() == text
    results = json.loads(text)
    path.write_text(text[: len(text) // 2])  # killed while it wrote them
    assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == 0
    assert trained(tmp_path / "run")[1] == before
    again = json.loads(path.read_text())
    assert again["after"] == results["after"]
    assert again["before"] == results["before"]
    assert again["seconds"] == results["seconds"]
    assert again["saved_bytes"] > 0


def test_a_run_is_not_overwritten_by_accident(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--steps", "1") == 0
    assert run(*arguments, "--steps", "1") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*arguments, "--steps", "2", "--overwrite") == 0


def test_resuming_an_overwritten_run_does_not_take_up_the_one_before(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise Interrupted("stopped")

    results = tmp_path / "run" / "results.json"
    assert run(*arguments, "--steps", "1") == 0
    for where, status in (("make_plan", 2), ("finish", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(f"smt_ext.train._Run.{where}", stop)
            assert run(*arguments, "--steps", "2", "--overwrite") == 130
        assert not results.exists()
        assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == status
    assert json.loads(results.read_text())["steps"] == 2


def test_resume_takes_no_other_settings(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--resume", str(tmp_path), "--lr", "1") == 2
    assert "takes no others (got lr)" in capsys.readouterr().err
    assert run("train", "--resume", str(tmp_path)) == 2
    assert "config.yaml is missing" in capsys.readouterr().err


def test_resume_refuses_a_changed_base_model(
    arguments: list[str],
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from models import tiny_llama

    assert run(*arguments) == 0
    other = tmp_path / "other"
    tiny_llama(seed=1, max_position_embeddings=256).save_pretrained(other)
    for file in Path(checkpoint).glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(checkpoint, str(other)))
    (tmp_path / "run" / "results.json").unlink()  # as of a run that has not ended
    assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == 2
    assert "holds other values than the base model" in capsys.readouterr().err
