"""The first day on a GPU: without one it says so; what works without is tried; failures are recorded."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import first_gpu
from first_gpu import Part

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tools" / "first_gpu.py")]
CHECKS = ROOT / "tests" / "cpp" / "cuda"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for logs and records."""
    monkeypatch.setattr(first_gpu, "WORK", tmp_path / "work")
    return tmp_path / "work"


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def run(parts: list[Part], target: Path, minutes: float = 1.0) -> dict[str, dict[str, Any]]:
    """Name -> entry, as read from the record."""
    record: dict[str, Any] = {"parts": []}
    env = first_gpu.environment("90")
    first_gpu.run_all(parts, record, target, dry=False, minutes=minutes, env=env)
    return {entry["name"]: entry for entry in json.loads(target.read_text())["parts"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once_and_says_why(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = subprocess.run(
        [*PROGRAM, "--record", str(record)], capture_output=True, text=True, check=False
    )
    assert done.returncode == first_gpu.NO_GPU
    assert "no GPU: torch" in done.stderr
    assert not record.exists()


def test_what_works_without_a_gpu_does(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    names = ["machine", "python tests", "graphs", "memory laws", "kernels", "step"]
    done = subprocess.run(
        [*PROGRAM, "--dry-run", "--record", str(record), "--parts", *names],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + record.read_text()
    entries = {entry["name"]: entry for entry in json.loads(record.read_text())["parts"]}
    assert list(entries) == names
    assert "test_gpu_graphs.py" in entries["graphs"]["output"]
    assert "test_values.py" in entries["python tests"]["output"]
    assert "test_gpu_graphs.py" not in entries["python tests"]["output"]
    rows = entries["step"]["results"]["rows"]
    # Every method takes a step in tests/benchmarks/test_programs.py.
    assert [row["method"] for row in rows] == ["floor (all frozen)", "SMT 0.84 % qkv"]
    assert all(row["seconds"] > 0 for row in rows)
    assert {"block_grad", "gather_columns"} <= {
        row.get("op") for row in entries["kernels"]["results"]["rows"]
    }


def test_a_failure_is_recorded_and_the_rest_goes_on(work: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    found = run([
        Part("fails", 30, python("print('why it failed'); raise SystemExit(3)"), []),
        Part("hangs", 1.5, ["sh", "-c", "echo begun; sleep 60 & sleep 60"], []),
        Part("missing", 30, [str(tmp_path / "no-such-program")], []),
        Part("works", 30, python("print('done')"), []),
    ], tmp_path / "record.json")  # fmt: skip
    assert time.monotonic() - begin < 30  # what the hanging part had started is ended too
    assert [entry["status"] for entry in found.values()] == [
        "failed",
        "out of time",
        "failed",
        "ok",
    ]
    assert found["fails"]["exit status"] == 3
    assert "why it failed" in found["fails"]["output"]
    assert "begun" in found["hangs"]["output"]
    assert "no-such-program" in found["missing"]["output"]


def test_a_benchmark_of_which_a_method_failed_is_not_ok(work: Path, tmp_path: Path) -> None:
    rows = {"rows": [{"method": "full", "failed": "out of memory"}, {"method": "SMT"}]}
    write = f"pathlib.Path(os.environ['SMT_RECORDS'], 'b.json').write_text({json.dumps(rows)!r})"
    text = f"import os, pathlib; {write}"
    found = run([Part("bench", 30, python(text), [], ("b",))], tmp_path / "record.json")
    assert found["bench"]["status"] == "failed"
    assert found["bench"]["results"] == rows


def test_what_there_is_no_time_for_is_said(work: Path, tmp_path: Path) -> None:
    part = Part("late", 30, python("print('ran')"), [])
    found = run([part], tmp_path / "record.json", minutes=0.01)
    assert found["late"]["status"] == "not run"


def test_resuming_keeps_what_went_well_and_does_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    first = [*PROGRAM, "--dry-run", "--record", str(target), "--parts", "machine"]
    subprocess.run(first, check=True, capture_output=True)
    done = subprocess.run(
        [*first, "graphs", "--resume"], check=True, capture_output=True, text=True
    )
    assert "machine ..." not in done.stdout
    assert "graphs: ok" in done.stdout
    assert [entry["name"] for entry in json.loads(target.read_text())["parts"]] == [
        "machine", "graphs",
    ]  # fmt: skip


def test_the_short_list_names_cases_that_exist() -> None:
    def named(path: Path) -> list[tuple[str, str, str]]:
        return re.findall(r"^(T\w+)\((\w+), (\w+)\)", path.read_text(), re.M)

    cases = [
        f"{suite}{number}.{case}"
        for path in CHECKS.glob("test_*.cpp")
        for kind, suite, case in named(path)
        for number in ([f"/{i}" for i in range(7)] if kind == "TYPED_TEST" else [""])
    ]
    for pattern in first_gpu.SHORT_LIST:
        assert fnmatch.filter(cases, pattern), pattern
    # Each program of the checks has some of them.
    for path in CHECKS.glob("test_*.cpp"):
        suites = {suite for _, suite, _ in named(path)}
        assert any(p.partition("/")[0].partition(".")[0] in suites for p in first_gpu.SHORT_LIST)


def test_every_part_fits_its_time() -> None:
    parts = first_gpu.parts_of("90")
    assert len({part.name for part in parts}) == len(parts)
    together = sum(max(part.limit for part in group) for group in first_gpu.groups(parts))
    assert together / 60 <= 40  # limits are for the worst; --minutes ends it at 25


def test_googletest_is_carried(tmp_path: Path) -> None:
    if not Path("/usr/src/googletest").is_dir():
        pytest.skip("GoogleTest's sources are not installed")
    subprocess.run([*PROGRAM, "--carry", str(tmp_path)], check=True)
    assert (tmp_path / "usr" / "src" / "googletest" / "CMakeLists.txt").exists()
