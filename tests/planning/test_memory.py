"""Law 8: planning needs no more memory than training, plus one layer's score buffers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the peak is that of the process. The weights (8 x 16 MB) are large against
# the activations (8 x 2 MB) and the interpreter's noise, so that stored gradients would be seen.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import smt_ext

torch.set_num_threads(2)
WIDTH, LAYERS, TOKENS = 2048, 8, 256

def number(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

def model_of(width):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

def loss_fn(model, batch):
    return model(batch).square().mean()

def train(model, x):
    model.requires_grad_(False)
    loss_fn(model, x.clone().requires_grad_(True)).backward()

def plan(model, x):
    smt_ext.make_plan(model, [x, x], budget="50%", block_size=256, targets="all-linear",
                      loss_fn=loss_fn, progress=False)

def dense(model, x):
    model.requires_grad_(True)
    loss_fn(model, x).backward()

run = {"train": train, "plan": plan, "dense": dense}[sys.argv[1]]
run(model_of(512), torch.randn(TOKENS, 512))  # thread pools, code and buffers of the libraries
model, x = model_of(WIDTH), torch.randn(TOKENS, WIDTH)
base = number("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run(model, x)
print(json.dumps(number("VmHWM") - base))
"""


def peak_of(what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak: int = json.loads(done.stdout)
    return peak


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_planning_stays_within_a_training_step():
    weight = 4 * 2048 * 2048
    activations = 8 * 4 * 256 * 2048
    train, plan, dense = (peak_of(what) for what in ("train", "plan", "dense"))
    # All layers' inputs are kept for scoring; beyond those, what backward itself holds and a
    # margin of half a weight for the tiles in flight. One dense gradient would not fit.
    assert plan <= activations + train + weight // 2, (train, plan, dense)
    # The measure sees gradients where they are stored.
    assert dense >= plan + 4 * weight, (train, plan, dense)
