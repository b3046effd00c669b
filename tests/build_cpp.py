"""Builds of tests/cpp with CMake and ninja, under build/cpp.

``plain``: the CPU kernels, and the CUDA kernels under the SIMT checker, which watches every access; with
the Python module of tests/cpp/python. ``sanitized``: the CPU kernels with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILDS = ("plain", "sanitized")


class BuildError(Exception):
    """A tool is missing, or does not accept the sources."""


def tool(name: str) -> str:
    """The path of cmake, ctest or ninja, from the virtual environment first."""
    own = Path(sys.executable).parent
    found = shutil.which(name, path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise BuildError("the C++ checks need cmake and ninja: pip install cmake ninja")
    return found


@functools.cache
def build(name: str, target: str = "all") -> Path:
    """Configure a build and make a target; its folder. What is up to date is left alone.

    One process at a time: the others wait, and find it made.
    """
    folder = ROOT / "build" / "cpp" / name
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / "one-at-a-time.lock"):
        configure(name, folder)
        run([tool("ninja"), "-C", str(folder), target])
    return folder


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Inside, no other process is that has named the same file."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sanitized_package() -> Path:
    """A folder with smt_ext whose CPU operators are compiled with both sanitizers."""
    folder = ROOT / "build" / "sanitized_package"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1"
    environment = {**os.environ, "SMT_EXT_CUDA": "0", "CXXFLAGS": flags}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    folder.parent.mkdir(exist_ok=True)
    with one_at_a_time(folder.with_suffix(".lock")):
        # Not removed first: another process may run what lies there.
        shutil.copytree(ROOT / "smt_ext", folder / "smt_ext", dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.so"))  # fmt: skip
        run(command, cwd=ROOT, env=environment)
    return folder


def sanitizer_libraries() -> list[str]:
    """What a program that is not compiled with sanitizers must load before all others."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    names = ("libasan.so", "libubsan.so")
    return [run([compiler, f"-print-file-name={name}"]).strip() for name in names]


def configure(name: str, folder: Path) -> None:
    """CMake's part of a build."""
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(map(shutil.which, compilers)):
        raise BuildError(
            f"the C++ checks need a C++ compiler, none of {', '.join(compilers)} was found: install "
            "one (apt-get install build-essential), or name it in the environment variable CXX"
        )
    options = python_options() if name == "plain" else ["-DSMT_EXT_SANITIZE=ON"]
    run([tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
         f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
         f"-DCMAKE_PREFIX_PATH={ROOT / 'build' / 'googletest' / 'usr'}", *options])  # fmt: skip


def python_options() -> list[str]:
    """What the Python module is built with: the Python that runs the tests."""
    try:
        from pybind11 import get_cmake_dir
    except ImportError:
        message = "the checks of the CUDA kernels need pybind11: pip install pybind11"
        raise BuildError(message) from None
    return [
        "-DSMT_EXT_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={get_cmake_dir()}",
    ]


def run(command: list[str], **settings: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    if done.returncode:
        output = f"{done.stdout}\n{done.stderr}"[-8000:]
        raise BuildError(f"{' '.join(command)} failed:\n{output}")
    return done.stdout
