"""Every CUDA kernel on every architecture that ships: compiles without a warning, spills nothing,
and its main loop is what it was designed to be. Compiles, runs nothing: needs nvcc, no GPU.

The first run compiles for minutes; build/cuda_report keeps what was read until a source changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cuda_report.__main__ import faults
from cuda_report.objects import ROOT, ReportError, Toolchain, read, setup_py
from cuda_report.report import Row, engine_of, report, short_name
from cuda_report.sass import Loop

DEFAULT = setup_py().DEFAULT_CUDA_ARCHS.split(";")
ARCHITECTURES = [arch.removesuffix("+PTX") for arch in DEFAULT]
Select = Callable[[str, str], list[Row]]


def toolchain(patch: pytest.MonkeyPatch, architectures: str | None) -> Toolchain:
    patch.delenv("SMT_EXT_CUDA_ARCHS", raising=False)
    if architectures is not None:
        patch.setenv("SMT_EXT_CUDA_ARCHS", architectures)
    try:
        return Toolchain()
    except ReportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    with pytest.MonkeyPatch.context() as patch:
        return toolchain(patch, None)


@pytest.fixture(scope="module")
def rows(tools: Toolchain) -> list[Row]:
    return report(tools, ROOT / "build" / "cuda_report")


@pytest.fixture
def of(rows: list[Row]) -> Select:
    """The rows of an architecture with a text in their name, at least one."""

    def select(arch: str, name: str) -> list[Row]:
        selected = [row for row in rows if row.arch == arch and name in row.kernel]
        assert selected, f"no kernel {name} on sm_{arch}"
        return selected

    return select


def loop_of(row: Row) -> Loop:
    assert row.loop is not None, f"{row.kernel} on sm_{row.arch} has no main loop"
    return row.loop


def test_all_architectures_and_ptx_for_later_ones(tools: Toolchain, rows: list[Row]) -> None:
    assert ARCHITECTURES == ["80", "86", "89", "90", "100", "120"]
    assert tools.flags[-1] == "-gencode=arch=compute_120,code=compute_120"
    # A kernel of a header (write_page) is one of every file that includes it.
    kernels = {(row.compiled.file, row.kernel) for row in rows}
    for arch in ARCHITECTURES:
        of_arch = [(row.compiled.file, row.kernel) for row in rows if row.arch == arch]
        assert set(of_arch) == kernels
        assert len(of_arch) == len(kernels), "two kernels of one name"
    assert {file for file, _ in kernels} == {source.name for source in tools.sources}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_no_stack_and_blocks_fit(of: Select, arch: str) -> None:
    assert [f"{row.kernel}: {fault}" for row in of(arch, "") for fault in faults(row)] == []
    for row in of(arch, "Tile<"):
        assert row.engine is not None
        assert row.engine.threads == row.compiled.threads
        # While one waits at a barrier another computes; tall tiles leave no room for that on all.
        assert row.engine.blocks > 1 or "<256, " in row.kernel or ", 256, " in row.kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_core_loop_of_large_blocks(of: Select, arch: str) -> None:
    """The bars for block_grad of bfloat16 at L = 256, whose tiles are 128 x 128."""
    for row in of(arch, "MmaTile<bf16, 128, 128>"):
        counts = loop_of(row).counts
        # 32 tokens of a warp's 64 x 64 part: 2 x 4 x 8 products of 16 x 8 x 16. 2 operands x 32
        # tokens x 16 pieces of 16 bytes, by 128 threads.
        assert (counts["mma"], counts["async copy"]) == (64, 8)
        assert counts["mma"] >= 2.5 * counts["ldmatrix"]
        assert loop_of(row).per_unit <= 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tall_tiles_compute_enough_for_what_they_load(of: Select, arch: str) -> None:
    for row in of(arch, "MmaTile<bf16, 256, "):
        counts = loop_of(row).counts
        assert counts["mma"] >= 2.5 * counts["ldmatrix"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_loops(of: Select, arch: str) -> None:
    """What the other tiles reach today: a change that costs instructions is seen."""
    for name, most in {
        "MmaTile<f16, 128, 128>": 4.0, "MmaTile<bf16, 64, 64>": 5.0, "MmaTile<bf16, 32, 32>": 6.5,
        "MmaTile<bf16, 256, 64>": 3.5, "MmaTile<bf16, 256, 32>": 4.2,
        "Tf32Tile<128, 128>": 6.0, "FmaTile<f32, 128>": 1.25, "FmaTile<f32, 64>": 1.35,
    }.items():  # fmt: skip
        for row in of(arch, name):
            assert loop_of(row).per_unit <= most, row.kernel


def test_a_spill_and_missing_launch_bounds_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = toolchain(monkeypatch, "80")
    spills = tmp_path / "spills.cu"
    spills.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) spills(float* p) {  // 32 registers
          float v[64];
        #pragma unroll
          for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[i] * v[63 - i];
        }
        """
    )
    (kernel,) = read(tools, spills, tmp_path / "cache")
    assert (kernel.registers, kernel.threads, kernel.loop) == (32, 1024, None)
    assert kernel.spill_stores > 0
    assert kernel.spill_loads > 0
    row = Row("spills", kernel, None, 2, 1.0, "registers")
    assert [fault.split()[0] for fault in faults(row)] == ["spills", "has"]
    assert read(tools, spills, tmp_path / "cache") == [kernel]

    spills.write_text("__global__ void unbounded(float* p) { *p = 1; }")
    with pytest.raises(ReportError, match=r"unbounded.* has no __launch_bounds__"):
        read(tools, spills, tmp_path / "cache")


def test_warnings_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = toolchain(monkeypatch, "80")
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void __launch_bounds__(32) f(float* p) { int unused; *p = 1; }")
    with pytest.raises(ReportError, match=r"unused.*was declared but never referenced"):
        tools.compile(source, tmp_path / "warns.o")


def test_report_as_a_program(tmp_path: Path, rows: list[Row]) -> None:
    json_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "cuda_report", "--kernel", "block_grad<MmaTile<bf16, 128, 128>",
               "--arch", "80", "90", "--json", str(json_file)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for grouped in ("false", "true"):  # twice in two tables
        assert done.stdout.count(f"| block_grad<MmaTile<bf16, 128, 128>, {grouped}> ") == 4
    assert {row["compiled"]["arch"] for row in json.loads(json_file.read_text())} == {"80", "90"}


def test_names() -> None:
    demangled = (
        "void smt_ext::cuda::block_grad_kernel<smt_ext::cuda::MmaTile<__nv_bfloat16, 128, 128>, true>"
        "(smt_ext::cuda::BlockGradArgs, long)"
    )
    assert short_name(demangled) == "block_grad<MmaTile<bf16, 128, 128>, true>"
    assert engine_of(demangled) == "smt_ext::cuda::MmaTile<__nv_bfloat16, 128, 128>"
    assert short_name("smt_ext::cuda::sparse_adamw_kernel(int)") == "sparse_adamw"
    assert engine_of("smt_ext::cuda::sparse_adamw_kernel(int)") is None
