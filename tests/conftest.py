"""Settings of all tests, and the GoogleTest cases as pytest items.

tests/cpp/CMakeLists.txt is collected as the builds of build_cpp.py. Each suite of an executable runs
once; its cases report one by one.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from build_cpp import BUILDS, ROOT, BuildError, build, run, tool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run on a CUDA device, and fail where there is none (make test-gpu)",
    )


# Of the files and folders: whose tests begin first where several workers share them, the longest
# first, so that no worker is left with one of these while the others have nothing to do.
LONGEST = (
    "tests/cpp/",
    "tests/quality/test_harness.py",
    "tests/distributed/test_examples.py",
    "tests/architectures/",
    "tests/estimate/",
    "tests/adapters/test_eight_bit.py",
    "tests/docs/",
    "tests/cuda_build/",
)


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)  # of pytest-xdist: they share the cores
    if worker and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // worker["workercount"])
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of what tests start
        torch.set_num_threads(threads)
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    if config.getoption("--gpu") and (reason := why_no_gpu()):
        raise pytest.UsageError(f"--gpu: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [not item.nodeid.startswith(path) for path in LONGEST])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What imports make stays: Python's garbage collector is kept from going through it.

    With torch and transformers that takes half a second, and trainers ask for it all the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


def why_no_gpu() -> str:
    """What keeps smt_ext from running on a GPU here, and the way out; "" if nothing does."""
    if torch.version.cuda is None:
        return f"no GPU: torch {torch.__version__} is a build without CUDA (pytorch.org has others)"
    if not torch.cuda.is_available():
        return "no GPU: torch finds no CUDA device"
    from smt_ext import ops

    if not ops.cuda_archs():
        return (
            "smt_ext was built without CUDA kernels. Build it where nvcc is: "
            "SMT_EXT_CUDA=1 pip install --no-build-isolation --editable ."
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or later"
    return ""


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where a test of the operators runs: on the CPU, and with --gpu on the GPU."""
    return "cuda" if request.config.getoption("--gpu") else "cpu"


# Compiled graphs are cached by source, but one that was made while ATEN_CPU_CAPABILITY held torch down
# crashes a process without it (torch 2.13).
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(ROOT / "build" / "inductor" / torch.backends.cpu.get_cpu_capability()),
)

# The same examples at every run, and none too slow for a busy machine.
hypothesis.settings.register_profile("smt_ext", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("smt_ext")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from the same random state and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def smt_data() -> Path:
    """The folder with the paper's evaluation sets."""
    folder = Path(os.environ.get("SMT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"evaluation sets absent: SMT_DATA names the folder, {folder} does not exist")
    return folder


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path == ROOT / "tests" / "cpp" / "CMakeLists.txt":
        return CMakeProject.from_parent(parent, path=file_path)
    return None


class CMakeProject(pytest.File):
    """All GoogleTest executables, in each build."""

    def collect(self) -> Iterator[pytest.Collector]:
        for name in BUILDS:
            yield CMakeBuild.from_parent(self, name=name)


class CMakeBuild(pytest.Collector):
    """One configuration: configured and built when collected."""

    def collect(self) -> Iterator[pytest.Collector]:
        try:
            folder = build(self.name)
            listing = run([tool("ctest"), "--test-dir", str(folder), "--show-only=json-v1"])
        except BuildError as error:
            raise self.CollectError(str(error)) from error
        tests = json.loads(listing)["tests"]
        executables = sorted({test["command"][0] for test in tests if "command" in test})
        if not executables:
            raise self.CollectError(f"no GoogleTest case in {folder}")
        for executable in executables:
            yield GoogleTestExecutable.from_parent(
                self, name=Path(executable).name, executable=executable
            )


class GoogleTestExecutable(pytest.Collector):
    """Its suites."""

    def __init__(self, executable: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.executable = executable

    def collect(self) -> Iterator[pytest.Collector]:
        listing = subprocess.run(
            [self.executable, "--gtest_list_tests"], capture_output=True, text=True, check=True
        ).stdout
        cases: dict[str, list[str]] = {}
        for line in listing.splitlines():
            name = line.partition("#")[0].strip()
            if name.endswith(".") and not line.startswith(" "):
                suite = cases.setdefault(name[:-1], [])
            elif line.startswith("  "):
                suite.append(name)
        for name, names in cases.items():
            yield GoogleTestSuite.from_parent(
                self, name=name, executable=self.executable, cases=names
            )


class GoogleTestSuite(pytest.Collector):
    """Runs once, when its first case is asked for: what pytest-xdist gives to one worker."""

    def __init__(self, executable: str, cases: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.executable = executable
        self.cases = cases
        self._report: dict[str, dict[str, Any]] | None = None
        self.output = ""

    def collect(self) -> Iterator[pytest.Item]:
        for name in self.cases:
            yield GoogleTestCase.from_parent(self, name=name)

    def report(self) -> dict[str, dict[str, Any]]:
        """Case name -> its entry in GoogleTest's JSON report."""
        if self._report is None:
            path = Path(f"{self.executable}.{self.name.replace('/', '-')}.report.json")
            path.unlink(missing_ok=True)
            done = subprocess.run(
                [self.executable, f"--gtest_filter={self.name}.*", f"--gtest_output=json:{path}"],
                capture_output=True,
                text=True,
                check=False,
            )
            self.output = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"[-6000:]
            suites = json.loads(path.read_text())["testsuites"] if path.exists() else []
            self._report = {case["name"]: case for suite in suites for case in suite["testsuite"]}
        return self._report


class GoogleTestFailure(Exception):
    """Carries the text of a failed case."""


class GoogleTestCase(pytest.Item):
    def runtest(self) -> None:
        parent = self.parent
        assert isinstance(parent, GoogleTestSuite)
        case = parent.report().get(self.name)
        if case is None:
            raise GoogleTestFailure(f"no result: {parent.name} did not finish\n{parent.output}")
        if case["result"] == "SKIPPED":
            reasons = [skip.get("message", "") for skip in case.get("skipped", [])]
            pytest.skip(reasons[0].partition("\n")[2] or "skipped" if reasons else "skipped")
        if failures := case.get("failures"):
            raise GoogleTestFailure("\n".join(failure["failure"] for failure in failures))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
        if isinstance(excinfo.value, GoogleTestFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name
