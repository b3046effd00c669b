"""The build's settings and its messages; runs setup.py as a program, without compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cuda_report.objects import setup_py

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` with a PATH that has no nvcc, and a compiler that does nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "SMT_EXT"))}
    environment |= {"PATH": str(tmp_path), "CXX": "true", **settings}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "temp"),
               "--build-lib", str(tmp_path / "lib")]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_cuda_is_required_but_there_is_no_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, SMT_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "SMT_EXT_CUDA=1 asks for CUDA kernels, but nvcc was not found" in done.stderr
    assert f"{tmp_path}/bin/nvcc" in done.stderr
    assert "set CUDA_HOME" in done.stderr


def test_unknown_values_are_refused(tmp_path: Path) -> None:
    done = build(tmp_path, SMT_EXT_CUDA="yes")
    assert done.returncode != 0
    assert "SMT_EXT_CUDA is 'yes', expected 0, 1 or auto" in done.stderr


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "one.h").write_text("inline int one() { return 1; }\n")
    (tmp_path / "a.cpp").write_text('#include "one.h"\nint a() { return one(); }\n')
    (tmp_path / "b.cpp").write_text("int b() { return 2; }\n")
    commands = [["c++", "-O0", "-c", str(tmp_path / name)] for name in ("a.cpp", "b.cpp")]

    def compiled(commands: list[list[str]]) -> list[str]:
        """The sources that were compiled now."""
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("objects/*.o")}
        objects = setup_py().compile_all(commands, tmp_path / "objects")
        assert [path.name.partition("-")[0] for path in objects] == ["a.cpp", "b.cpp"]
        return [path.name[:5] for path in objects if path.stat().st_mtime_ns != before.get(path)]

    assert compiled(commands) == ["a.cpp", "b.cpp"]
    assert compiled(commands) == []
    (tmp_path / "one.h").write_text("inline int one() { return 11; }\n")
    assert compiled(commands) == ["a.cpp"]
    optimised = [[command[0], "-O1", *command[2:]] for command in commands]
    assert compiled(optimised) == ["a.cpp", "b.cpp"]
    assert compiled(commands) == []
    (tmp_path / "b.cpp").write_text("int b() { return }\n")
    with pytest.raises(SystemExit, match="did not compile"):
        compiled(commands)


def test_the_binary_uses_torchs_stable_abi_alone() -> None:
    spec = find_spec("smt_ext._C")
    assert spec is not None
    assert spec.origin is not None
    assert spec.origin.endswith(".abi3.so")
    audit = Path(sys.executable).with_name("torch-abi-audit")
    done = subprocess.run(
        [str(audit), "--check", "both", "smt_ext"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unstable=0" in done.stdout
    assert "Min torch:   2.10.0" in done.stdout
