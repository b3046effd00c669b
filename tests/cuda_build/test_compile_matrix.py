"""Every CUDA kernel on every architecture that ships: compiles without a warning, spills nothing,
and its main loop is what it was designed to be. Compiles, runs nothing: needs nvcc, no GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cuda_report.__main__ import faults
from cuda_report.objects import ROOT, ReportError, Toolchain, setup_py
from cuda_report.report import Row, report

DEFAULT = setup_py().DEFAULT_CUDA_ARCHS.split(";")
ARCHITECTURES = [arch.removesuffix("+PTX") for arch in DEFAULT]
# Constants of tile_product.cuh: the tiles of L = 256, 128 and L = 64.
BF16_LARGE, BF16_MIDDLE = "MmaTile<bf16, 128>", "MmaTile<bf16, 64>"


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SMT_EXT_CUDA_ARCHS", raising=False)
        try:
            return Toolchain()
        except ReportError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows(tools: Toolchain) -> list[Row]:
    return report(tools, ROOT / "build" / "cuda_report")


@pytest.fixture
def of(rows: list[Row]) -> Callable[[str, str], list[Row]]:
    """The rows of an architecture with a text in their name, at least one."""

    def select(arch: str, name: str) -> list[Row]:
        selected = [row for row in rows if row.arch == arch and name in row.kernel]
        assert selected, f"no kernel {name} on sm_{arch}"
        return selected

    return select


def test_all_architectures_and_ptx_for_later_ones(tools: Toolchain, rows: list[Row]) -> None:
    assert ARCHITECTURES == ["80", "86", "89", "90", "100", "120"]
    assert tools.flags[-1] == "-gencode=arch=compute_120,code=compute_120"
    kernels = {row.kernel for row in rows}
    for arch in ARCHITECTURES:
        assert {row.kernel for row in rows if row.arch == arch} == kernels
    files = {row.compiled.file for row in rows}
    assert files == {source.name for source in tools.sources}
    assert len(kernels) == len(rows) / len(ARCHITECTURES), "two kernels of one name"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_no_stack_and_blocks_fit(of: Callable[..., list[Row]], arch: str) -> None:
    assert [f"{row.kernel}: {fault}" for row in of(arch, "") for fault in faults(row)] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_core_loop_of_large_blocks(of: Callable[..., list[Row]], arch: str) -> None:
    """The bars for block_grad of bfloat16 at L = 256."""
    for row in of(arch, BF16_LARGE):
        loop = row.loop
        assert loop is not None
        # 32 tokens of a 64 x 64 part of the tile: 2 x 4 x 8 products of 16 x 8 x 16; 16 pieces of
        # 16 bytes of each of 2 x 32 rows, copied by 128 threads.
        assert (loop.counts["mma"], loop.counts["async copy"]) == (64, 8)
        assert loop.counts["mma"] >= 2.5 * loop.counts["ldmatrix"]
        assert loop.per_unit <= 4
