"""Evaluation while training: what it records, and that training does not notice it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import smt_ext.train
from commands import LIMITS, assert_same, evaluations, run
from models import save_checkpoint
from smt_ext.checkpoint.blocks import save_blocks

EVERY = ["--eval-every", "2", "--score", "equation", "--max-new-tokens", "4"]


@pytest.fixture
def with_dropout(arguments: list[str], tmp_path: Path) -> list[str]:
    """The arguments with a model that draws random numbers while it trains."""
    model = save_checkpoint(tmp_path / "model", attention_dropout=0.2)
    return [*arguments, "--model", str(model)]


def every_evaluation(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """``action(model, number)`` before each evaluation of a run; number 0 is before training."""
    original, number = smt_ext.train.evaluate, 0

    def evaluate(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        action(model, number)
        number += 1
        return original(model, *args, **kwargs)

    monkeypatch.setattr(smt_ext.train, "evaluate", evaluate)


def test_training_does_not_notice(
    with_dropout: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*with_dropout, "--accumulate", "2"]
    assert run(*flags, "--output", str(tmp_path / "without")) == 0
    # Some models draw random numbers in evaluation as well.
    every_evaluation(monkeypatch, lambda model, number: torch.rand(number))
    assert run(*flags, *EVERY, "--output", str(tmp_path / "with")) == 0
    assert_same(tmp_path / "without", tmp_path / "with")
    assert [e["step"] for e in evaluations(tmp_path / "without")] == [0, 6]
    assert [e["step"] for e in evaluations(tmp_path / "with")] == [0, 2, 4, 6]


def test_each_is_the_quality_of_that_step(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def save(model: Any, number: int) -> None:
        if number:
            save_blocks(model, tmp_path / str(2 * number))

    with monkeypatch.context() as patched:
        every_evaluation(patched, save)
        assert run(*arguments, *EVERY) == 0
    found = evaluations(tmp_path / "run")
    model, held_out = (arguments[arguments.index(f) + 1] for f in ("--model", "--eval"))
    for entry in found[1:]:
        capsys.readouterr()
        blocks = str(tmp_path / str(entry["step"]))
        command = ["--quiet", "--model", model, "--blocks", blocks, "--data", held_out]
        assert run("eval", *command, *EVERY[2:], *LIMITS) == 0
        printed = capsys.readouterr().out
        assert f"loss {entry['loss']:.4f} nats" in printed
        assert f"right answers {entry['accuracy']:.1%}" in printed
    assert len({entry["loss"] for entry in found}) == 4
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["evaluations"] == found
    for when, entry in (("before", found[0]), ("after", found[-1])):
        assert results[when] == {k: entry[k] for k in ("loss", "accuracy")}


def test_later_evaluations_are_dropped_on_resume(arguments: list[str], tmp_path: Path) -> None:
    """Of steps that will be taken again, as with their metrics."""
    assert run(*arguments, *EVERY) == 0
    path = tmp_path / "run" / "evaluations.jsonl"
    made = evaluations(tmp_path / "run")
    path.write_text(path.read_text() + json.dumps({**made[-1], "step": 8}) + "\n")
    (tmp_path / "run" / "results.json").unlink()  # as of a run that has not ended
    assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == 0
    assert evaluations(tmp_path / "run") == made


def test_a_signal_ends_an_evaluation_at_once(
    with_dropout: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = [*with_dropout, *EVERY, "--save-every", "5"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*flags, "--output", str(whole)) == 0

    def stop(model: Any, number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        every_evaluation(patched, stop)
        assert run(*flags, "--output", str(stopped)) == 130
    assert "stopped after step 4 of 6; the state is saved" in capsys.readouterr().err
    assert [e["step"] for e in evaluations(stopped)] == [0, 2]
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 4
    assert run("train", "--quiet", "--resume", str(stopped)) == 0
    assert_same(whole, stopped)
    assert evaluations(whole) == evaluations(stopped)


def test_what_is_shown(arguments: list[str], capsys: Any) -> None:
    arguments = [a for a in arguments if a != "--quiet"]
    assert run(*arguments, *EVERY) == 0
    shown = capsys.readouterr().out
    for step in (2, 4):
        assert f"step {step}: held-out loss " in shown
    assert "step 6: held-out" not in shown
    assert "best" in shown
    assert run(*arguments, "--overwrite") == 0
    shown = capsys.readouterr().out
    assert "step 2: held-out" not in shown
    assert "best" not in shown


def test_bad_input(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    assert run(*arguments, "--eval-every", "-1") == 2
    assert "'eval_every' is -1, expected 0 or more" in capsys.readouterr().err
    at = arguments.index("--eval")
    assert run(*arguments[:at], *arguments[at + 2 :], "--eval-every", "2") == 2
    assert "eval_every = 2 needs held-out rows: pass --eval" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(*arguments, *EVERY) == 0
    (tmp_path / "run" / "results.json").unlink()  # as of a run that has not ended
    (tmp_path / "run" / "evaluations.jsonl").write_text('{"step": 0')
    assert run("train", "--quiet", "--resume", str(tmp_path / "run")) == 2
    assert "evaluations.jsonl' is damaged" in capsys.readouterr().err
