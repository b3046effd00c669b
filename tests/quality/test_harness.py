"""The harness from end to end on a tiny model: run, killed and resumed, tables of what there is."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import general_text, run
from benchmarks.quality.matrix import METHODS, Trial, load_matrix
from benchmarks.quality.rows import Example
from benchmarks.quality.run import load_records, main, missing, run_matrix
from benchmarks.quality.tasks import load_task
from benchmarks.quality.trial import fulfil, run_trial, write_record
from smt_ext.hf import word_problems
from smt_ext.hf.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "benchmarks" / "quality" / "smoke.yaml"


@pytest.fixture
def folder(
    quality_model: Path, quality_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where the smoke matrix can run: a folder with its ``model``, and SMT_DATA set."""
    (tmp_path / "model").symlink_to(quality_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMT_DATA", str(quality_data))
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def few_paragraphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the general text, which every trial reads twice: two batches."""
    paragraphs = general_text.PATH.read_text(encoding="utf-8").split("\n\n")
    path = tmp_path_factory.mktemp("general") / "general.txt"
    path.write_text("\n\n".join(paragraphs[:9]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general_text, "PATH", path)
        yield


@functools.cache
def an_smt_trial() -> Trial:
    return next(w.trial for w in load_matrix(SMOKE).wanted if w.trial.method == "smt")


def a_trial(method: str = "smt", task: str = "math", **fields) -> Trial:
    """Two steps of one method, as the smoke matrix would run them."""
    trial = an_smt_trial()
    changes = {"task": task, "method": method, "lr": None if method == "base" else 1e-3}
    if method != "smt":
        changes |= {"metric": None, "block_size": None, "plan_batches": None}
    if method in ("base", "full", "dense"):
        changes |= {"budget": None}
    if method in ("base", "full"):
        changes |= {"targets": None}
    return dataclasses.replace(trial, **{**changes, **fields})


@pytest.fixture(scope="module")
def records(
    quality_model: Path, quality_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every trial of the smoke matrix, run in this process."""
    path = tmp_path_factory.mktemp("records")
    matrix = load_matrix(SMOKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quality_model.parent)
        for wanted in missing(matrix, {}):  # development runs come first
            trial = matrix.resolve(wanted.trial, load_records(path))
            assert trial is not None
            write_record(path / f"{trial.id}.json", run_trial(trial, quality_data))
    assert missing(matrix, load_records(path)) == []
    return path


def test_the_whole_way_to_the_tables(records: Path, folder: Path) -> None:
    out = folder / "out"
    assert main(["tables", str(SMOKE), "--records", str(records), "--output", str(out)]) == 0
    text = (out / "tables.md").read_text()
    assert "not yet run" not in text
    assert "16 of the 16 entries" in text
    for plot in re.findall(r"\]\((.*?)\)", text):
        assert (out / plot).stat().st_size > 5000
    assert {"curves-math.png", "plateau-math.png", "gradients-math.png"} <= {
        p.name for p in out.iterdir()
    }
    # The numbers in a row are those of the records.
    found = [r for r in load_records(records).values() if r["trial"]["method"] == "spiel"]
    mean = sum(r["held_out_loss"]["test"] for r in found) / len(found)
    (row,) = (line for line in text.splitlines() if re.match(r"\| SpIEL-AG, qkv .* of 2", line))
    assert f"| {mean:.4f} ±" in row
    assert "2 of 2" in row
    # What the learning rates were chosen from, and what the development runs took.
    losses = [r["held_out_loss"]["dev"] for r in load_records(records).values()
              if r["trial"]["split"] == "dev"]  # fmt: skip
    for loss in losses:
        assert (f"**{loss:.4f}**" if loss == min(losses) else f" {loss:.4f} ") in text
    assert "| math | learning rates | 2 | 0.0" in text


def test_a_record_says_all(records: Path) -> None:
    found = list(load_records(records).values())
    (one,) = (r for r in found if r["trial"]["method"] == "smt" and r["trial"]["seed"] == 1)
    assert set(one["data"]) == {"math/split/train.jsonl", "math/split/test.jsonl"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in one["data"].values())
    assert len(one["loss_curve"]) == 2
    assert one["memory"]["peak"] >= one["memory"]["held_before"] > 0
    assert one["memory"]["saved"] > 0
    assert one["seconds"]["step"] > 0
    assert {"torch", "transformers", "CPU", "threads"} <= one["environment"].keys()
    assert one["commit"]
    # Nine problems in two sets, at most four of each, and the three twins apart.
    assert {n: len(c["equation"]) for n, c in one["right"].items()} == {
        "addsub": 4, "svamp": 4, "near twins": 3,
    }  # fmt: skip
    assert 0 < one["trained"]["percent"] <= 10
    lora = next(r for r in found if r["trial"]["method"] == "lora")
    assert lora["trained"]["rank"] >= 1
    development = [r for r in found if r["trial"]["split"] == "dev"]
    assert len(development) == 2
    assert all("right" not in r and set(r["held_out_loss"]) == {"dev"} for r in development)
    best = min(development, key=lambda r: r["held_out_loss"]["dev"])
    assert one["trial"]["lr"] == best["trial"]["lr"]


def test_methods_see_the_same_data(folder: Path, quality_data: Path) -> None:
    """A learning rate of nothing: all methods then have the untrained model's losses."""
    curves = {}
    for method in METHODS.keys() - {"base"}:
        record = run_trial(a_trial(method, lr=1e-30, precision="fp32"), quality_data)
        curves[method] = record["loss_curve"]
    for method, curve in curves.items():
        assert curve == pytest.approx(curves["full"], rel=1e-5), method
    other = run_trial(a_trial("full", lr=1e-30, precision="fp32", seed=1), quality_data)
    assert other["loss_curve"] != pytest.approx(curves["full"], rel=1e-5)


@pytest.fixture(scope="module")
def untrained(quality_model: Path, quality_data: Path) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quality_model.parent)
        return run_trial(a_trial("base", split="dev"), quality_data)["held_out_loss"]["dev"]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"base"}))
def test_every_method_learns(
    method: str, folder: Path, quality_data: Path, untrained: float
) -> None:
    # Adapters of low rank are chaotic at 0.03: whether they learn is up to the CPU's rounding.
    low = dict.fromkeys(("lora", "rslora", "dora"), 1e-2)
    lr = {"full": 1e-3, "dense": 1e-2, "miss": 1e-2, **low}.get(method, 3e-2)
    record = run_trial(a_trial(method, lr=lr, steps=24, split="dev"), quality_data)
    assert record["held_out_loss"]["dev"] < untrained - 0.05


OPTIONS = {
    "beside": {"also_train": "*norm*", "auto": 1.0, "lr": None},
    "beside at a rate": {"also_train": "*norm*", "also_lr": 1e-2},
    "by gradient": {"matrix_lr": "gradient"},
    "row": {"optimizer": "row"},
    "muon": {"optimizer": "muon"},
    "clipped": {"rms_clip": 1.0},
    "rotated": {"rotate_every": 5, "metric": "random"},
    "rotated by score": {"rotate_every": 5, "also_train": "*norm*", "also_lr": 1e-2},
}


# In float32: bfloat16 is slow on many CPUs, and the smoke matrix and the methods have it.
LONGER = {"lr": 3e-2, "steps": 24, "split": "dev", "precision": "fp32"}


@pytest.fixture(scope="module")
def plain(quality_model: Path, quality_data: Path) -> dict[str, Any]:
    """The record of blocks without any option."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quality_model.parent)
        return run_trial(a_trial(**LONGER), quality_data)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_blocks_learns(
    name: str, folder: Path, quality_data: Path, untrained: float, plain: dict[str, Any]
) -> None:
    trial = a_trial(**{**LONGER, **OPTIONS[name]})
    record = run_trial(trial, quality_data)
    assert record["held_out_loss"]["dev"] < untrained - 0.05
    assert record["loss_curve"] != plain["loss_curve"]
    if trial.also_train:
        assert record["trained"]["also_parameters"] > 0
        assert record["trained"]["parameters"] > plain["trained"]["parameters"]
    if (
        trial.rms_clip
    ):  # another class computes these steps, so that they differ from plain ones anyway
        loose = run_trial(dataclasses.replace(trial, rms_clip=1e9), quality_data)
        assert record["loss_curve"] != loose["loss_curve"]
    if trial.rotate_every:
        assert record["trained"]["rotation"]["rounds"] == 4  # begun at steps 0, 5, 10, 15


@pytest.mark.parametrize("targets", ["all-but-embedding", "params:*embed*", "qkv"])
def test_dense_trains_what_is_named(targets: str, folder: Path, quality_data: Path) -> None:
    record = run_trial(a_trial("dense", targets=targets, split="dev"), quality_data)
    shapes = load_model(str(folder / "model"), torch.float32).named_parameters()
    numel = {name: p.numel() for name, p in shapes}
    wanted = {
        "all-but-embedding": [n for n in numel if "embed" not in n],
        "params:*embed*": [n for n in numel if "embed" in n],
        "qkv": [n for n in numel if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj")],
    }[targets]
    assert record["trained"]["parameters"] == sum(numel[n] for n in wanted) > 0


def test_general_text_is_read_before_and_after(folder: Path, quality_data: Path) -> None:
    still = run_trial(a_trial("full", lr=1e-30, split="dev"), quality_data)["general_text"]
    assert still["before"] == pytest.approx(still["after"], rel=1e-6)
    assert still["tokens"] > 1000
    moved = run_trial(a_trial("full", lr=3e-2, steps=4, split="dev"), quality_data)["general_text"]
    assert moved["before"] == still["before"]
    assert abs(moved["after"] - moved["before"]) > 1e-3


def test_commonsense_compares_options(folder: Path, quality_data: Path) -> None:
    record = run_trial(a_trial("base", task="commonsense"), quality_data)
    assert set(record["right"]) == {"arc-e", "winogrande"}
    assert all(len(c["likelihood"]) == 4 for c in record["right"].values())
    assert record["loss_curve"] == []
    assert record["held_out_loss"]["test"] > 0


def test_stories_are_held_out_and_judged(folder: Path, quality_data: Path) -> None:
    tokenizer = load_tokenizer("model")
    trial = a_trial(task="stories", split="test", max_length=512, limit=4)
    data = load_task(trial, quality_data, tokenizer)
    words = "|".join((r"\d+", *word_problems._NAMES, *word_problems._THINGS))

    def stories(examples: list[Example]) -> set[str]:
        asked = ("".join(tokenizer.decode(e.input_ids).split()) for e in examples)
        return {re.sub(words, "", text.partition("Answer:")[0]) for text in asked}

    train, dev, test = map(stories, (data.train, data.dev, data.groups["test"]))
    assert len(train) == len(word_problems._TRAIN_STORIES.splitlines())
    assert not train & (dev | test)
    record = run_trial(trial, quality_data)
    assert record["accuracy"]["test"]["equation"]["rows"] == 4
    assert record["held_out_loss"]["test"] > 0


def test_development_rows_are_never_trained_on(folder: Path, quality_data: Path) -> None:
    data = load_task(a_trial(), quality_data, load_tokenizer("model"))
    assert data.dev
    assert not {e.input_ids for e in data.dev} & {e.input_ids for e in data.train}
    tests = {e.input_ids for group in data.groups.values() for e in group}
    assert not tests & {e.input_ids for e in data.dev}


class HereAndNow:
    """In place of a trial's process, whose imports take ten times as long as the trial."""

    stdout = ()

    def __init__(self, request: dict[str, Any]) -> None:
        fulfil(request)

    def wait(self) -> int:
        return 0


def test_killed_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of the whole program leaves complete records alone, and the next call takes the rest."""
    path = folder / "records"
    command = [sys.executable, "-m", "benchmarks.quality", "run", str(SMOKE), "--only", "methods",
               "--quiet", "--jobs", "2", "--records", str(path)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while not list(path.glob("*.json")):
            assert process.poll() is None, "ended without a record"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {p: p.stat().st_mtime_ns for p in path.glob("*.json")}
    assert before
    load_records(path)  # none is cut off
    matrix = load_matrix(SMOKE, ["methods"])
    left = missing(matrix, load_records(path))
    assert len(left) > 0
    assert main(["run", str(SMOKE), "--only", "methods", "--records", str(path), "--dry-run"]) == 0
    assert f"all that is missing  {len(left):4} trials" in capsys.readouterr().out
    first = dataclasses.replace(matrix, wanted=matrix.wanted[:2])
    monkeypatch.setattr(run, "_start", HereAndNow)
    assert run_matrix(first, path, Path(os.environ["SMT_DATA"]), jobs=2, progress=False) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert missing(first, load_records(path)) == []
    # What development chose is in the record.
    (smt,) = (r for r in load_records(path).values()
              if r["trial"]["method"] == "smt" and r["trial"]["split"] == "test")  # fmt: skip
    assert [lr for lr, _ in smt["lr_choice"]["dev_losses"]] == [1e-3, 1e-2]


def test_a_failing_trial_leaves_no_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # it is taken for the name of a model elsewhere
    assert main(["run", str(SMOKE), "--records", "records", "--limit", "1", "--quiet"]) == 1
    assert "exit status 1" in (shown := capsys.readouterr().err)
    assert "DataError" in shown
    assert list((folder / "records").iterdir()) == []


def test_absent_data_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMT_DATA", "nowhere")
    assert main(["run", str(SMOKE), "--records", "records"]) == 2
    assert "Set SMT_DATA to the folder" in capsys.readouterr().err


def test_jobs_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two trials waits for the other to begin."""
    waiting = """if True:
        import json, pathlib, sys, time
        request = json.load(sys.stdin)
        record = pathlib.Path(request["record"])
        record.with_suffix(".begun").touch()
        deadline = time.monotonic() + 30
        while len(list(record.parent.glob("*.begun"))) < 2:
            if time.monotonic() > deadline:
                sys.exit("alone")
            time.sleep(0.01)
        record.write_text(json.dumps({"threads": request["threads"]}))
    """
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{waiting}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    matrix = load_matrix(SMOKE, ["methods"])
    two = [w for w in matrix.wanted if w.trial.method == "lora"]
    assert len(two) == 2
    matrix = dataclasses.replace(matrix, wanted=tuple(two))
    assert run_matrix(matrix, tmp_path, tmp_path, jobs=2, progress=False) == 0
    share = max(1, (os.cpu_count() or 1) // 2)
    for wanted in two:
        record = json.loads((tmp_path / f"{wanted.trial.id}.json").read_text())
        assert record == {"threads": share}


def test_no_jobs_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(SMOKE), "--records", "records", "--jobs", "0"]) == 2
    assert "jobs is 0, expected 1 or more" in capsys.readouterr().err


def test_the_tables_in_the_tree_are_those_of_the_records(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "quality" / "results"
    records = ROOT / "benchmarks" / "records" / "quality"
    matrix = str(ROOT / "benchmarks" / "quality" / "matrix.yaml")
    assert main(["tables", matrix, "--records", str(records), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "tables.md").read_text() == (results / "tables.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in results.iterdir()}


def test_tables_of_nothing_say_so(folder: Path) -> None:
    assert main(["tables", str(SMOKE), "--records", "none", "--output", "out"]) == 0
    text = (folder / "out" / "tables.md").read_text()
    assert "0 records; 0 of the 16 entries" in text
    assert text.count("not yet run") == 11


def test_a_damaged_record_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "records").mkdir()
    (folder / "records" / "half.json").write_text(json.dumps({"id": 1})[:-1])
    assert main(["tables", str(SMOKE), "--records", "records", "--output", "out"]) == 2
    assert "half.json" in capsys.readouterr().err
