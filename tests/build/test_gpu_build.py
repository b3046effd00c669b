"""The checks for a real GPU (make test-gpu, make sanitize-gpu) compile, link, and fail without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "cpp" / "gpu" / "run.sh"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def output_of(command: list[str], **environment: str) -> tuple[int, str]:
    own = Path(sys.executable).parent  # cmake and ninja of the virtual environment
    path = f"{own}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def program() -> Path:
    """One of the programs, for one architecture; kept between runs."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = ROOT / "build" / "cpp" / "gpu-compiled"
    for command in (
        ["cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "-DSMT_EXT_GPU=ON",
         "-DSMT_EXT_CUDA_ARCHS=80", f"-DCMAKE_PREFIX_PATH={ROOT / 'build' / 'googletest' / 'usr'}"],
        ["ninja", "-C", str(folder), "test_optimizer_cuda"],
    ):  # fmt: skip
        status, output = output_of(command)
        assert status == 0, output
    return folder / "tests" / "cpp" / "gpu" / "test_optimizer_cuda"


def test_without_a_gpu_the_checks_fail_and_say_why(program: Path) -> None:
    status, output = output_of([str(program)], **NO_GPU)
    assert status == 1
    assert "no GPU" in output
    assert "`make test` runs the same kernels" in output
    assert "[       OK ]" not in output


def test_make_test_gpu_fails_without_a_gpu_and_says_why(program: Path) -> None:
    for arguments in ([], ["--sanitize"]) if shutil.which("compute-sanitizer") else ([],):
        status, output = output_of(["sh", str(RUN), *arguments], SMT_EXT_CUDA_ARCHS="", **NO_GPU)
        assert status != 0
        assert "no GPU: nvcc finds none" in output
        assert not (ROOT / "build" / "cpp" / "gpu").exists()


def test_the_cases_are_those_of_the_checker(program: Path) -> None:
    status, listing = output_of([str(program), "--gtest_list_tests"])
    assert status == 0
    source = (ROOT / "tests" / "cpp" / "cuda" / "test_optimizer_cuda.cpp").read_text()
    cases = [line.strip() for line in listing.splitlines() if line.startswith("  ")]
    assert {"FollowsTheFormula", "SeesEveryInfAndNan", "LayersOfAllTypesInOneLaunch"} <= set(cases)
    assert all(case in source for case in cases)


def test_compute_sanitizer_is_asked_for(tmp_path: Path) -> None:
    status, output = output_of(
        ["sh", str(RUN), "--sanitize"], PATH="/usr/bin:/bin", CUDA_HOME=str(tmp_path)
    )
    assert status == 1
    assert "needs compute-sanitizer" in output
    assert str(tmp_path) in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pytest_with_gpu_fails_where_there_is_none() -> None:
    command = [sys.executable, "-m", "pytest", "--gpu", "--collect-only", "-q", "tests/gpu"]
    status, output = output_of(command)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--gpu: no GPU: torch" in output
