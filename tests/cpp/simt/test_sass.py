"""What ptx.cuh becomes under nvcc: one machine instruction a wrapper, on every architecture.

Needs nvcc and cuobjdump (the toolkit's, or PyPI nvidia-cuda-cuobjdump), no GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cuda_report.sass import disassemble, find_tool

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[2] / "csrc" / "kernels" / "cuda"
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
LOADS = r"LDG\.E"
STORES = r"STG\.E"

# Kernel of ptx_probe.cu -> instructions it must have, and how often.
EXPECTED: dict[str, dict[str, int]] = {
    "cp_async_16": {r"LDGSTS\.E\.BYPASS\.LTC128B\.128": 1},
    "cp_async_8": {r"LDGSTS\.E\.64": 1},
    "cp_async_4": {r"LDGSTS\.E(\.ZFILL)? ": 1},
    "cp_async_commit_wait": {"LDGSTS": 1, "LDGDEPBAR": 1, r"DEPBAR\.LE SB0, 0x3": 1},
    "ldmatrix_x4": {r"LDSM\.16\.M88\.4": 1},
    "ldmatrix_x4_trans": {r"LDSM\.16\.MT88\.4": 1},
    "ldmatrix_x2": {r"LDSM\.16\.M88\.2": 1},
    "ldmatrix_x2_trans": {r"LDSM\.16\.MT88\.2": 1},
    "mma_bf16": {r"HMMA\.16816\.F32\.BF16": 1, "HMMA": 1},
    "mma_f16": {r"HMMA\.16816\.F32 ": 1, "HMMA": 1},
    "mma_tf32": {r"HMMA\.1688\.F32\.TF32": 1, "HMMA": 1},
    "ld_global_16": {r"LDG\.E\.128 ": 1, LOADS: 1},
    "ld_global_nc_16": {r"LDG\.E\.128\.CONSTANT": 1, LOADS: 1},
    "ld_global_nc_2": {r"LDG\.E\.U16\.CONSTANT": 1, LOADS: 1},
    "ld_global_stream_16": {r"LDG\.E\.EF\.128": 1, LOADS: 1},
    "st_global_16": {r"STG\.E\.128": 1, STORES: 1},
    "st_global_8": {r"STG\.E\.64": 1, STORES: 1},
    "st_global_stream_16": {r"STG\.E\.EF\.128": 1, STORES: 1},
    "ld_st_shared_16": {r"LDS\.128": 1, r"STS\.128": 1},
    "shared_array": {r"LDS ": 1, r"STS ": 1},
    "block_index_x": {r"S2U?R U?R\d+, SR_CTAID\.X": 1},
    "prefetch_l2": {r"CCTL\.E\.PF2": 1},
}


@pytest.fixture(scope="module")
def sass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Architecture -> kernel -> its instructions."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("needs nvcc and cuobjdump")
    binary = tmp_path_factory.mktemp("sass") / "probe.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++17", "-Werror", "all-warnings", f"-I{CUDA_SOURCES}", *targets]
    subprocess.run([*command, "-c", str(HERE / "ptx_probe.cu"), "-o", str(binary)], check=True)
    return {
        architecture: {
            kernel: [instruction.text for instruction in code]
            for kernel, code in disassemble(cuobjdump, binary, architecture).items()
        }
        for architecture in ARCHITECTURES
    }


@pytest.mark.parametrize("kernel", EXPECTED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapper_is_one_instruction(
    sass: dict[str, dict[str, list[str]]], architecture: str, kernel: str
) -> None:
    # ptxas puts "@!PT LDS RZ" (never executed) before asynchronous copies.
    code = [i for i in sass[architecture][kernel] if not i.startswith("@!PT")]
    for pattern, count in EXPECTED[kernel].items():
        found = [i for i in code if re.search(pattern, i)]
        assert len(found) == count, f"{pattern}: {len(found)} times in\n" + "\n".join(code)


def test_every_wrapper_is_probed(sass: dict[str, dict[str, list[str]]]) -> None:
    assert set(EXPECTED) | {"cvt_rna_tf32"} == set(sass["80"])
    header = (CUDA_SOURCES / "ptx.cuh").read_text()
    probe = (HERE / "ptx_probe.cu").read_text()
    wrappers = set(re.findall(r"__device__ __forceinline__ [\w:<>*& ]+?(\w+)\(", header))
    wrappers -= {"bit_cast", "word", "smem_address"}  # what wrappers use
    assert len(wrappers) >= 20
    assert {w for w in wrappers if f"ptx::{w}" not in probe} == set()


def test_conversion_to_tf32_rounds(sass: dict[str, dict[str, list[str]]]) -> None:
    """No instruction for cvt.rna.tf32 anywhere: add half of the last bit, cut 13 bits."""
    for architecture in ARCHITECTURES:
        code = "\n".join(sass[architecture]["cvt_rna_tf32"])
        assert "0xffffe000" in code
        assert "INF" in code
        assert "CALL" not in code
