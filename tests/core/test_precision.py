"""Which precision fits a device, and what a user is told."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import smt_ext
from models import tiny_llama
from smt_ext import precision
from smt_ext.hf.loading import load_model


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_warned", False)


def set_ratio(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[torch.device]:
    """Make the measurement answer ``ratio``; the devices it was asked for."""
    asked: list[torch.device] = []

    def answer(device: torch.device) -> float:
        asked.append(device)
        return ratio

    monkeypatch.setattr(precision, "_time_ratio", answer)
    return asked


def plan_for(model: nn.Module) -> smt_ext.BlockPlan:
    return smt_ext.make_plan(
        model, metric="weight", targets="re:0", block_size=16, budget="1 blocks"
    )


def plan_and_patch(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    smt_ext.patch(model, plan_for(model))


@pytest.mark.parametrize(
    ("ratio", "dtype", "slow"),
    [(0.6, torch.bfloat16, None), (1.0, torch.bfloat16, None), (9.0, torch.float32, 9.0)],
)
def test_a_cpu_is_measured(
    monkeypatch: pytest.MonkeyPatch, ratio: float, dtype: torch.dtype, slow: float | None
) -> None:
    asked = set_ratio(monkeypatch, ratio)
    assert precision.training_dtype("cpu") == dtype
    assert precision.slow_bfloat16("cpu") == slow
    assert set(asked) == {torch.device("cpu")}


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_a_gpu_is_asked(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    asked = set_ratio(monkeypatch, 8.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.training_dtype("cuda:1") == dtype
    assert len(asked) == (capability < (8, 0))


def test_other_devices_take_float32() -> None:
    assert precision.training_dtype("meta") == torch.float32


def test_a_slow_bfloat16_model_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ratio(monkeypatch, 9.04)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan_and_patch(torch.bfloat16)
        plan_and_patch(torch.bfloat16)
    (said,) = [str(w.message) for w in caught]
    assert "9.04 times as long" in said
    assert "dtype=torch.float32" in said
    assert "\n" not in said
    assert caught[0].filename == __file__  # of the caller, not of the package


def test_make_plan_and_patch_each_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ratio(monkeypatch, 9.0)
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="9 times as long"):
        plan = plan_for(model)
    monkeypatch.setattr(precision, "_warned", False)
    with pytest.warns(UserWarning, match="9 times as long"):
        smt_ext.patch(model, plan)


def test_a_fast_cpu_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ratio(monkeypatch, 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_and_patch(torch.bfloat16)


def test_nothing_is_measured_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_ratio(monkeypatch, 9.0)
    plan_and_patch(torch.float32)
    precision.warn_slow_bfloat16(nn.Linear(2, 2, dtype=torch.bfloat16, device="meta"))
    assert not asked


def test_a_measurement_leaves_no_trace() -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    ratio = precision._time_ratio.__wrapped__(torch.device("cpu"))
    assert ratio > 0.1
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_of_each_product() -> None:
    rates = {rate.product: rate for rate in precision.matmul_rates("cpu")}
    assert list(rates) == ["x @ w.T", "dy @ w", "dy.T @ x", "block_score_fused"]
    assert all(r.float32 > 0.01 and r.bfloat16 > 0.01 for r in rates.values())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="holds an x86 CPU down to AVX2")
def test_a_cpu_without_bfloat16_instructions_is_found_slow() -> None:
    code = (
        "from smt_ext import precision as p; print(p.slow_bfloat16('cpu'), p.training_dtype('cpu'))"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(out[0]) > 2
    assert out[1] == "torch.float32"


@pytest.mark.parametrize(("ratio", "dtype"), [(0.6, torch.bfloat16), (9.0, torch.float32)])
def test_load_model_takes_what_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, dtype: torch.dtype
) -> None:
    set_ratio(monkeypatch, ratio)
    tiny_llama().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == dtype
    assert load_model(str(tmp_path), torch.float16).dtype == torch.float16
    assert load_model(str(tmp_path), torch.float16, "meta").device.type == "meta"
