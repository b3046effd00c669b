"""Predictions stand on the launches that the launchers really choose, and on sound arithmetic."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import roofline
from roofline import GPUS, MODELS, TALL_TILES, TILES, Kernel, Launch, Schedule, Split

ROOT = Path(__file__).parents[2]
KERNELS = ("block_grad", "block_score", "gather_columns", "grad_norm", "sparse_adamw")
GPU_NAMES, MODEL_NAMES = list(GPUS), list(MODELS)


@pytest.fixture(scope="session")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """launches.cpp with the kernels' sources, as C++; kernels are never run, hence not linked whole."""
    folder = tmp_path_factory.mktemp("launches")
    cuda = ROOT / "csrc" / "kernels" / "cuda"
    common = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-DSMT_EXT_SIMT", "-fno-access-control",
              "-Wno-unknown-pragmas", f"-I{ROOT / 'tests' / 'cpp' / 'simt'}", f"-I{cuda}",
              "-xc++", "-c"]  # fmt: skip
    objects = []
    for source in (Path(__file__).with_name("launches.cpp"), *(cuda / f"{k}.cu" for k in KERNELS)):
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*common, str(source), "-o", objects[-1]], check=True)
    program = folder / "launches"
    subprocess.run(
        [common[0], *objects, "-o", str(program), "-no-pie", "-Wl,--unresolved-symbols=ignore-all"],
        check=True,
    )
    return program


def ask(launchers: Path, questions: list[str]) -> list[list[list[str]]]:
    """Per question its launches, as (name, blocks, threads, shared bytes) or the plain numbers."""
    done = subprocess.run(
        [str(launchers)], input="\n".join(questions), text=True, capture_output=True, check=True
    )
    return [[part.split() for part in line.split(",")] for line in done.stdout.splitlines()]


def described(launch: Launch) -> list[int]:
    return [launch.blocks, launch.threads, launch.shared_bytes]


def numbers(launches: list[list[str]], name: str) -> list[int]:
    (found,) = [launch for launch in launches if launch[0] == name]
    return [int(number) for number in found[1:]]


def test_tiles_and_rows_are_those_of_the_kernels(launchers: Path) -> None:
    tiles = [*TILES.values(), *TALL_TILES.values()]
    answers = ask(launchers, [*(f"tile {tile.rows} {tile.columns}" for tile in tiles), "rows"])
    for tile, (answer,) in zip(tiles, answers, strict=False):
        assert [int(number) for number in answer] == [
            tile.threads, tile.blocks, tile.shared_bytes, roofline.STAGES, roofline.PANEL_TOKENS,
        ]  # fmt: skip
    assert answers[-1] == [[str(roofline.ROW_THREADS), str(roofline.ROWS)]]


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_block_grad_is_launched_as_predicted(gpu: str, launchers: Path) -> None:
    device = GPUS[gpu]
    cases = list(
        itertools.product(
            (1, 511, 1024, 4096, 5000, 32768), (1, 9, 40, 400), (32, 64, 128, 256), (1, 3)
        )
    )
    questions = []
    for t, count, size, dys in cases:
        held = roofline.tile_of(size).resident(device)
        questions.append(
            f"block_grad {device.multiprocessors} {held} {t} 16384 16384 {size} {count} {dys}"
        )
    split = 0
    for (t, count, size, _), launches in zip(cases, ask(launchers, questions), strict=True):
        kernel = roofline.block_grad("", t, size, size, count, size, device)
        assert described(kernel.launches[0]) == numbers(launches, "block_grad")
        assert len(launches) == len(kernel.launches)
        if len(launches) == 2:
            split += 1
            assert described(kernel.launches[1]) == numbers(launches, "block_grad_add")
    assert 0 < split < len(cases)


def test_whole_block_columns_are_launched_as_predicted(
    launchers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A question has one number for how many blocks a multiprocessor holds, whatever their tile.
    monkeypatch.setattr(roofline.Tile, "resident", lambda tile, gpu: 2)
    device, tokens, rows = GPUS["H100"], (512, 4096, 32768), (512, 4096, 32768)
    cases = list(itertools.product(tokens, rows, ((64, 64), (32, 64), (32, 32))))
    questions = [
        f"block_columns {device.multiprocessors} 2 {t} {n} {size} {columns}"
        for t, n, (size, columns) in cases
    ]
    tall = 0
    for (t, n, (size, columns)), launches in zip(cases, ask(launchers, questions), strict=True):
        kernel = roofline.block_columns("", t, n, columns, size, device, tall=True)
        assert described(kernel.launches[0]) == numbers(launches, "block_grad")
        tall += kernel.launches[0].tile in TALL_TILES.values()
    assert 0 < tall < len(cases)


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_the_other_kernels_are_launched_as_predicted(model: str, launchers: Path) -> None:
    llama = MODELS[model]
    n, k = llama.linears["up"]
    for size in (32, 64, 128, 256):
        counts = [5, 0, 9, 40]
        listed = " ".join(map(str, counts))
        questions = {
            "gather_columns": f"gather_columns 5000 {k} {4 * size} {size}",
            "block_score": f"block_score {n} {k} {size}",
            "block_score_fused": f"block_score_fused 4096 {n} {k} {size}",
            "sparse_adamw": f"sparse_adamw {size} {listed}",
            "grad_norm_sums": f"grad_norm {size} {listed}",
        }
        predicted = {
            "gather_columns": roofline.gather_columns("", 5000, 4 * size),
            "block_score": roofline.block_score("", n, k, size),
            "block_score_fused": roofline.block_score_fused("", 4096, n, k, size, GPUS["H100"]),
            "sparse_adamw": roofline.sparse_adamw("", counts, size),
            "grad_norm_sums": roofline.grad_norm("", counts, size),
        }
        answers = ask(launchers, list(questions.values()))
        for (name, kernel), launches in zip(predicted.items(), answers, strict=True):
            assert described(kernel.launches[0]) == numbers(launches, name), (name, size)


def every_kernel(gpu: str) -> list[Kernel]:
    device = GPUS[gpu]
    kernels: list[Kernel] = []
    for model, tokens, size in itertools.product(MODELS.values(), (4096, 32768), (64, 256)):
        kernels += roofline.step_kernels(model, tokens, size, device)
        kernels += roofline.planning_kernels(model, tokens, size, device)
        kernels += roofline.optimizer_kernels(model, size)
    return kernels


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_nothing_is_faster_than_its_floor(gpu: str) -> None:
    device = GPUS[gpu]
    for kernel in every_kernel(gpu):
        assert kernel.seconds(device) >= kernel.floor(device) * (1 - 1e-9), kernel
        for launch in kernel.launches:
            assert 1 <= launch.resident(device) <= 32
            assert 0 < launch.occupancy(device) <= 1
            # A tile product fits as often as its __launch_bounds__ say.
            if launch.shared_bytes:
                assert launch.resident(device) == launch.most_resident


def test_parts_of_split_tokens_stay_in_the_cache() -> None:
    for gpu, tile in itertools.product(GPUS.values(), TILES.values()):
        # As many as fit at once are the most that are split.
        assert gpu.multiprocessors * tile.resident(gpu) * tile.entries * 4 < gpu.l2_bytes / 2


def whole(tiles: int, tokens: int) -> Schedule:
    return Schedule((Split(tiles, 1, tokens),))


def test_numbers_worked_out_by_hand() -> None:
    a100 = GPUS["A100"]
    # 27 tiles of 128 on 108 multiprocessors, in 8 parts each: two blocks a multiprocessor.
    parts = Schedule((Split(27, 8, 1024),))
    product = roofline.tile_product(TILES[128], parts, 8192, a100, 0.0, 0.0)
    assert (product.blocks, product.waves(a100)) == (216, 1.0)
    assert parts.busiest(128 * 128, 2, 108) == 2 * 1024
    assert product.flops == 2 * 8192 * 27 * 128 * 128
    assert product.cache_bytes == 27 * 8192 * 512 + 216 * 65536
    assert product.seconds(a100) == pytest.approx(
        max(product.flops / 312e12, product.cache_bytes / 5.4e12)
    )
    # One block a multiprocessor leaves it waiting a fifth of the time, two do not.
    assert whole(108, 8192).busiest(128 * 128, 2, 108) == 1.25 * 8192
    # One tile more than a wave of multiprocessors: the busiest does two; cut up it does little more.
    assert whole(109, 8192).busiest(128 * 128, 2, 108) == 2 * 8192
    assert (
        Schedule((Split(108, 1, 8192), Split(1, 64, 128))).busiest(128 * 128, 2, 108) == 1.25 * 8192
    )
    # Three rounds of 2 fill it, and one is left over.
    assert whole(7 * 108, 1000).busiest(128 * 128, 2, 108) == 6 * 1000 + 1.25 * 1000
    # One block of 16 KB in flight: 16384 B / 0.7 us, far below the bandwidth.
    few = roofline.streaming("", "", 1 << 20, 1, 256, 64).launches[0]
    assert few.seconds(a100) == pytest.approx((1 << 20) / (16384 / 0.7e-6))
    many = roofline.streaming("", "", 1 << 30, 8 * 108, 256, 64).launches[0]
    assert many.seconds(a100) == pytest.approx((1 << 30) / 2.039e12)
    # Registers: 255 of 128 threads fit twice into 65536.
    assert TILES[128].resident(GPUS["H100"]) == 2


def test_tails_are_cut_where_that_pays() -> None:
    """S = 34 to 40, 67 and 80 blocks of 256: what two or three tiles a multiprocessor left over."""
    rows = {
        (row["S"], row["T"]): row
        for row in roofline.schedule_rows(GPUS["H100"], (34, 40, 66, 67, 80), (512, 32768))
    }
    gains = {count: rows[count, 32768]["gain"] for count in (34, 40, 67, 80)}
    assert all(
        gain >= least for gain, least in zip(gains.values(), (1.3, 1.3, 1.3, 1.15), strict=True)
    )
    assert rows[66, 32768]["gain"] == 1  # nothing is left over
    assert rows[34, 512]["parts"] == 0  # too little work for a second launch


@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_one_launch_of_siblings_gains_or_costs_nothing(gpu: str) -> None:
    rows = list(roofline.sibling_rows(GPUS[gpu], (9, 34, 50, 67, 100), (2048, 8192, 32768)))
    gains = sorted(row["gain"] for row in rows)
    assert gains[1] >= 0.99  # of thirty a single one loses, on two of the GPUs
    assert sum(gains) / len(gains) > 1.02


def test_every_number_that_is_shown_says_what_it_is() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "roofline.py"), "--gpu", "H100", "--model",
         "Llama-3-8B", "--tokens", "4096"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tables = done.stdout.split("\n\n")
    assert len(tables) == 2
    for table in tables:
        assert "predicted, not measured" in table.splitlines()[0]
        assert "H100" in table


@pytest.mark.parametrize("tokens", roofline.TOKENS)
def test_smt_adds_little_to_the_frozen_layers_work(tokens: int) -> None:
    for model, gpu in itertools.product(MODELS.values(), GPUS.values()):
        step = roofline.step_of(model, tokens, 256, gpu)
        frozen, smt, full = (
            step[f"{name} ms"] for name in ("forward + dX", "SMT 0.84 % qkv", "full")
        )
        assert frozen < smt < full
