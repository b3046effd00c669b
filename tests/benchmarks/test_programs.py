"""The benchmarks run from end to end on tiny shapes, so that they still do on the day of need."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

import kernels
import pytest
import step
import torch

TINY = step.WORKLOADS["quick"]


def test_kernels_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["kernels.py", "--quick", "--dtype", "bf16"])
    kernels.main()
    out = capsys.readouterr().out
    for operator in ("block_grad", "block_score_fused", "gather_columns", "block_score",
                     "sparse_adamw_step_", "LoRA r=2", "DoRA r=2", "reference-style SMT"):  # fmt: skip
        assert operator in out
    assert "record" not in out


@pytest.mark.parametrize("method", step.methods_of(TINY))
def test_a_method_steps(method: str) -> None:
    ours, theirs = Pipe()

    def work() -> None:
        with theirs:  # closed by an exception too: the other end must not wait for ever
            step.work(theirs, method, TINY, torch.bfloat16, 1, False)

    worker = threading.Thread(target=work)
    worker.start()
    assert ours.poll(60), "no word from the method's process"
    facts = ours.recv()
    assert 0 < facts["percent"] <= 100
    assert facts["saved"] > 0
    runner = step.Runner(method, worker, ours, facts, [], [])
    step.take_turns([runner], steps=2, warm_up=1)
    step.stop(runner)
    row = step.row_of(runner, runner.seconds)
    assert row["method"] == method
    assert len(row["samples"]) == 2
    assert row["x floor"] == 1


def test_the_gpu_workload_has_the_methods_of_the_cpu() -> None:
    names = [list(step.methods_of(step.WORKLOADS[device])) for device in ("cpu", "cuda")]
    kinds = [[name.partition(" r=")[0] for name in of_device] for of_device in names]
    assert kinds[0] == kinds[1]
    assert names[0][:3] == ["floor (all frozen)", "SMT 0.84 % qkv", "SMT 2.4 % all linear"]
