"""The example scripts as a user starts them: torchrun and accelerate launch, two processes."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

import smt_ext
from smt_ext.checkpoint.blocks import read_blocks_info

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_machines", 1, "--main_process_port", 0]


def start(*command, cwd, seconds=300, **variables):
    """Run a command to its end; one that hangs fails with the stacks of all its processes."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONFAULTHANDLER": "1",
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The launcher last, so that it does not end the others before they have said where they are.
        launcher = psutil.Process(process.pid)
        for started in [*launcher.children(recursive=True), launcher]:
            started.send_signal(signal.SIGABRT)
        stdout, stderr = process.communicate()
        raise TimeoutError(f"not at its end after {seconds} s\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


# A thread of gloo's that lets go of its last tensor while the interpreter ends: pytorch/pytorch#190489.
# DTensor keeps the process group, and so its threads, beyond destroy_process_group.
ABORTED_BY_GLOO = "terminate called without an active exception\nFatal Python error: Aborted"


def launch(*command, cwd, attempts=1):
    """What a command prints that ends with 0. ``attempts``: runs, each from ``cwd`` as it is now,
    of which all but the last may end as gloo's threads sometimes end a process that is done."""
    for attempt in range(attempts, 0, -1):
        copy = Path(tempfile.mkdtemp(dir=cwd.parent)) / cwd.name
        if attempt > 1:
            shutil.copytree(cwd, copy)
        done = start(*command, cwd=cwd)
        if attempt == 1 or ABORTED_BY_GLOO not in done.stderr:
            break
        shutil.rmtree(cwd)
        copy.rename(cwd)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(output):
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", output, re.MULTILINE)]


def test_ddp(tmp_path):
    output = launch(*TORCHRUN, 2, ROOT / "examples" / "ddp.py", cwd=tmp_path)
    found = losses(output)
    assert len(found) == 10
    assert found[-1] < found[0]
    assert read_blocks_info(tmp_path / "blocks")["plan"].provenance["num_batches"] == 8


def test_fsdp2_and_on_at_another_number_of_processes(tmp_path):
    script = ROOT / "examples" / "fsdp2.py"
    first = losses(launch(*TORCHRUN, 2, script, "--steps", 6, cwd=tmp_path, attempts=3))
    assert len(first) == 6
    plan = read_blocks_info(tmp_path / "run" / "blocks")["plan"]
    plan.save(tmp_path / "plan.json")
    go_on = ["--steps", 2, "--plan", "plan.json"]
    output = launch(*TORCHRUN, 1, script, *go_on, cwd=tmp_path, attempts=3)
    assert re.findall(r"^step (\d+)", output, re.MULTILINE) == ["7", "8"]
    assert losses(output)[-1] < first[0]
    assert read_blocks_info(tmp_path / "run" / "blocks")["plan"] == plan


def test_accelerate_launch_with_ddp(tmp_path):
    options = ["--multi_gpu", "--num_processes", 2, "--mixed_precision", "no"]
    script = ROOT / "examples" / "accelerate_loop.py"
    output = launch(*ACCELERATE, *options, "--dynamo_backend", "no", script, cwd=tmp_path)
    found = losses(output)
    assert len(found) == 10
    assert found[-1] < found[0]
    # Two ranks have planned together.
    assert read_blocks_info(tmp_path / "blocks")["plan"].provenance["num_batches"] == 8


def test_processes_that_accelerate_does_not_connect_end(tmp_path):
    options = ["--multi_gpu", "--num_processes", 2, "--mixed_precision", "no"]
    script = ROOT / "examples" / "accelerate_loop.py"
    done = start(
        *ACCELERATE, *options, "--dynamo_backend", "no", script, cwd=tmp_path,
        ACCELERATE_USE_CPU="false",
    )  # fmt: skip
    assert done.returncode != 0
    assert "2 processes were started, and accelerate connects 1 of them" in done.stderr
    assert not (tmp_path / "blocks").exists()


def one_process(folder, steps=10):
    """What examples/accelerate_loop.py trains on two ranks, as one process with both their batches."""
    # By its path: benchmarks/ has a module of that name too.
    examples = runpy.run_path(str(ROOT / "examples" / "common.py"))
    load_model, batches_of = examples["load_model"], examples["batches_of"]
    base = load_model(None)
    model = smt_ext.patch(load_model(None), read_blocks_info(folder)["plan"])
    optimizer = smt_ext.SparseAdamW(model, lr=2e-3)
    pairs = list(zip(batches_of(model, rank=0), batches_of(model, rank=1), strict=True))
    found = []
    for step in range(steps):
        pair = pairs[step % len(pairs)]
        batch = {name: torch.cat([part[name] for part in pair]) for name in pair[0]}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model.state_dict(), base


def test_accelerate_launch_with_fsdp2(tmp_path):
    config = ["--config_file", ROOT / "examples" / "fsdp2.yaml"]
    scripts = [ROOT / "tests" / "fsdp_on_cpu.py", ROOT / "examples" / "accelerate_loop.py"]
    output = launch(*ACCELERATE, *config, *scripts, cwd=tmp_path)
    sharded, all_of_them = re.findall(r"FSDP2 on CPU: (\d+) of (\d+) parameters", output)[0]
    assert sharded == all_of_them
    expected, state, base = one_process(tmp_path / "blocks")
    # Rounded to four digits in the output; float32 sums in another order, each step on the last.
    torch.testing.assert_close(
        torch.tensor(losses(output)), torch.tensor(expected), rtol=0, atol=2e-4
    )
    loaded = smt_ext.load_blocks(base, tmp_path / "blocks")
    moved = off = 0.0
    for name, module in smt_ext.smt_modules(loaded).items():
        blocks = module.blocks.detach()
        off += float((blocks - state[f"{name}.blocks"]).abs().sum())
        moved += float((blocks - module.original_blocks).abs().sum())
    # Where a gradient is near zero Adam makes a whole step of its rounding; that is rare.
    assert off < 1e-3 * moved
