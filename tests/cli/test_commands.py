"""Each command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smt_ext
from commands import LIMITS, run
from models import mlp_plan
from smt_ext import precision
from smt_ext.planning.score_file import load_scores


def test_train_reports_and_leaves_its_artefacts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--score", "equation", "--max-new-tokens", "4") == 0
    out = capsys.readouterr().out
    for text in (
        "loss (nats a token)",
        "right answers",
        "trainable",
        "peak memory",
        "smt-ext export",
    ):
        assert text in out
    root = tmp_path / "run"
    results = json.loads((root / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["steps"] == 6
    assert 0 < results["smt_saved_bytes"] < results["full_saved_bytes"] < results["saved_bytes"]
    metrics = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(m["grad_norm"] > 0 for m in metrics)
    assert len((root / "answers.jsonl").read_text().splitlines()) == 8
    assert smt_ext.BlockPlan.load(root / "plan.json").num_blocks == 4


def test_the_commands_it_suggests_work(
    arguments: list[str],
    checkpoint: str,
    rows: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(*arguments)
    lines = capsys.readouterr().out.split("next:")[1].split("\n")
    commands = [line.split()[1:] for line in lines if line.strip().startswith("smt-ext")]
    assert [command[0] for command in commands] == ["export", "eval", "info"]
    losses = []
    for command in commands:
        assert run(*command) == 0
        losses.append(capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"{results['after']['loss']:.4f}" in losses[1]
    # The exported model alone has the same loss.
    assert run("eval", "--model", str(tmp_path / "run" / "model"), "--data", rows[1], *LIMITS) == 0
    assert f"{results['after']['loss']:.4f}" in capsys.readouterr().out


def test_eval_of_the_base_model_is_the_loss_before(
    arguments: list[str],
    checkpoint: str,
    rows: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(*arguments)
    before = json.loads((tmp_path / "run" / "results.json").read_text())["before"]["loss"]
    capsys.readouterr()
    assert run("eval", "--model", checkpoint, "--data", rows[1], *LIMITS) == 0
    assert f"{before:.4f}" in capsys.readouterr().out


def test_plan_then_train_with_it(
    arguments: list[str],
    checkpoint: str,
    rows: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "v.json"
    assert run("plan", "--quiet", "--model", checkpoint, "--data", rows[0], "--output", str(path),
               "--block-size", "32", "--budget", "2 blocks", "--targets", "v",
               "--plan-batches", "1", *LIMITS) == 0  # fmt: skip
    assert "v_proj" in capsys.readouterr().out
    plan = smt_ext.BlockPlan.load(path)
    assert {name.rpartition(".")[2] for name in plan.layers} == {"v_proj"}
    scores = load_scores(tmp_path / "v.scores.safetensors")
    assert scores.metric == "mean_abs"
    assert set(scores.modules) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert run(*arguments, "--plan", str(path)) == 0
    assert smt_ext.BlockPlan.load(tmp_path / "run" / "plan.json") == plan
    capsys.readouterr()
    assert run("info", str(path)) == 0
    text = capsys.readouterr().out
    assert text.startswith("BlockPlan: 2 blocks")
    assert run("info", str(tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    about, _, rest = capsys.readouterr().out.partition("\n\n")
    assert rest == text
    assert about.startswith("run of 6 steps, ")
    losses = (results[when]["loss"] for when in ("before", "after"))
    assert "held-out loss: {:.3f} before, {:.3f} after".format(*losses) in about
    assert "right answers" not in about
    (tmp_path / "run" / "results.json").unlink()
    assert run("info", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == f"this run has not ended\n\n{text}"


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(mlp_plan().to_json())
    reading, writing = os.pipe()
    os.close(reading)  # as head does, only sooner
    done = subprocess.run(
        [sys.executable, "-m", "smt_ext.cli", "info", tmp_path / "plan.json"],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_settings_from_yaml_and_flags(arguments: list[str], tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 3\nlr: 1e-3\ntargets: [v]\npacking: true\n")
    flags = [a for a in arguments if a not in ("--steps", "6", "--lr", "1e-2")]
    assert run(*flags, "--config", str(config), "--steps", "2", "--save_every=7") == 0
    saved = smt_ext.config.load_config(tmp_path / "run" / "config.yaml")
    assert (saved["steps"], saved["lr"], saved["targets"]) == (2, 1e-3, ["v"])
    assert saved["packing"] is True
    assert saved["save_every"] == 7


@pytest.mark.parametrize(
    "extra",
    [
        ["--precision", "bf16"],
        ["--precision", "bf16-mixed"],
        ["--packing"],
        ["--gradient-checkpointing"],
        ["--accumulate", "3"],
        ["--template", "alpaca", "--max-length", "200"],
        ["--targets", "all-linear", "--metric", "l2", "--allocation", "uniform", "--budget", "20%"],
    ],
    ids=lambda extra: extra[0],
)
def test_train_lowers_the_loss_with(arguments: list[str], extra: list[str], tmp_path: Path) -> None:
    assert run(*arguments, *extra) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["skipped_steps"] == 0


def test_accumulation_equals_the_large_batch(arguments: list[str], tmp_path: Path) -> None:
    losses = []
    for batch, accumulate in (("4", "1"), ("1", "4")):
        out = tmp_path / batch
        run(*arguments, "--batch-size", batch, "--accumulate", accumulate, "--output", str(out),
            "--metric", "weight")  # fmt: skip
        losses.append(json.loads((out / "results.json").read_text())["after"]["loss"])
    # The rows are ordered by length within windows, so that micro-batches hold other rows than the
    # large batches do; the runs see the same rows an epoch and land close to each other.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for text in ("CPU kernels", "threads", "CUDA kernels", smt_ext.__version__):
        assert text in out


def test_env_shows_rates_and_the_precision_that_suits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_time_ratio", lambda device: 9.0)
    assert run("env") == 0
    out = capsys.readouterr().out
    for product in ("x @ w.T", "dy @ w", "dy.T @ x", "planning"):
        assert re.search(
            rf"^{re.escape(product)} .*[\d.]+ GFLOP/s in float32, [\d.]+ in bfloat16$", out, re.M
        )
    assert re.search(r"^precision +auto on the CPU is float32, .* 9 times as long$", out, re.M)
