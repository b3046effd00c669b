"""The example scripts as a user starts them: torchrun and accelerate launch, two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from smt_ext.checkpoint import read_blocks_info

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_machines", 1, "--main_process_port", 0]


def launch(*command, cwd):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
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
    first = losses(launch(*TORCHRUN, 2, script, "--steps", 6, cwd=tmp_path))
    assert len(first) == 6
    plan = read_blocks_info(tmp_path / "run" / "blocks")["plan"]
    plan.save(tmp_path / "plan.json")
    output = launch(*TORCHRUN, 1, script, "--steps", 2, "--plan", "plan.json", cwd=tmp_path)
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
