"""Short runs of the two fuzzers, with new seeds each time; ``make fuzz`` runs them for longer."""

from __future__ import annotations

import random
import subprocess

import fuzz_calls
import pytest
import torch

from build_cpp import build


def test_random_calls_are_clean_under_sanitizers():
    program = build("sanitized", "fuzz_kernels") / "tests" / "cpp" / "fuzz_kernels"
    done = subprocess.run([str(program), "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    seed, cases = done.stdout.splitlines()
    assert seed.startswith("seed ")
    assert int(cases.split()[0]) > 20


def test_random_calls_are_taken_and_refused_alike_by_kernels_and_fakes():
    _, faults = fuzz_calls.run(5, random.randrange(2**31))
    assert not faults, faults


@pytest.mark.parametrize("name", fuzz_calls.NAMES)
def test_hostile_shapes(name):
    """Some cases of every operator, whatever the machine's speed: empty, one row, ragged, strided."""
    faults = [fuzz_calls.fault_of(name, seed) for seed in range(12)]
    assert not any(faults), faults


@pytest.mark.parametrize("name", fuzz_calls.NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_opcheck_of_random_right_calls(name, seed):
    case = fuzz_calls.Case(seed)
    arguments = list(getattr(case, name)().values())
    torch.library.opcheck(getattr(torch.ops.smt_ext, name).default, arguments)


def test_the_fuzz_sees_a_fake_that_does_not_check(monkeypatch):
    from smt_ext import ops

    monkeypatch.setattr(ops, "_check_index", lambda *args: None)
    faults = [fuzz_calls.fault_of("gather_blocks", seed) for seed in range(60)]
    assert any("the fake takes what the kernel refuses" in (fault or "") for fault in faults)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 24), (2, 3)])
def test_indices_of_any_shape_get_wrong_values(shape):
    case = fuzz_calls.Case(0)
    index = case.tensor(shape, torch.int32)
    wrong = [case.spoil_tensor(index) for _ in range(60)]
    assert any(w.shape == shape and w.dtype == torch.int32 and not w.equal(index) for w in wrong)
