"""accelerate: prepare() with DDP and with FSDP2, clipping, and its own checkpoints."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

import fsdp_on_cpu
import smt_ext
from models import llama_plan, stack
from processes import run_ranks

STEPS = 4
LR = 1e-2


def patched():
    model = stack()
    return smt_ext.patch(model, llama_plan(model, ("gate_proj", "up_proj", "down_proj")))


def make_optimizer(model, kind):
    if kind == "SparseAdamW":
        return smt_ext.SparseAdamW(model, lr=LR)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def accelerator_of(kind, **settings):
    if kind != "FSDP2":
        return Accelerator(cpu=True)
    fsdp_on_cpu.install()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Residual"],
        reshard_after_forward=True,
        **settings,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    return accelerator


def train(model, optimizer, accelerator, steps, part=slice(None)):
    for step in steps:
        x = torch.randn(8, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(x[part]))
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model):
    return {
        name.removeprefix("module."): (v.full_tensor() if isinstance(v, DTensor) else v).clone()
        for name, v in model.state_dict().items()
    }


def train_rank(rank, wrapper, kind, settings, folder):
    accelerator = accelerator_of(wrapper, **settings)
    assert accelerator.num_processes == 2
    model = patched()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, kind))
    part = slice(4 * rank, 4 * rank + 4)
    train(model, optimizer, accelerator, range(2), part)
    accelerator.save_state(folder)
    train(model, optimizer, accelerator, range(2, STEPS), part)
    expected = whole_state(model)
    accelerator.load_state(folder)
    train(model, optimizer, accelerator, range(2, STEPS), part)
    again = whole_state(model)
    sharded = [isinstance(p, DTensor) for p in model.parameters()]
    return expected, all(torch.equal(again[n], expected[n]) for n in expected), sharded


@pytest.mark.parametrize("kind", ["SparseAdamW", "AdamW"])
@pytest.mark.parametrize(
    ("wrapper", "settings"),
    [
        ("DDP", {}),
        ("FSDP2", {"cpu_ram_efficient_loading": False}),
        ("FSDP2", {"cpu_ram_efficient_loading": True}),
    ],
    ids=["DDP", "FSDP2", "FSDP2, weights from rank 0"],
)
def test_prepare_trains_saves_and_resumes(tmp_path, kind, wrapper, settings):
    ranks = run_ranks(
        train_rank, 2, tmp_path / "ranks", wrapper, kind, settings, str(tmp_path / "state")
    )
    alone = accelerator_of("none")
    model = patched()
    optimizer = make_optimizer(model, kind)
    train(model, optimizer, alone, range(STEPS))
    for state, resumed, sharded in ranks:
        assert resumed
        assert all(sharded) == any(sharded) == (wrapper == "FSDP2")
        for name, value in whole_state(model).items():
            # See tests/distributed/test_ddp.py.
            torch.testing.assert_close(state[name], value, rtol=0, atol=STEPS * LR * 1e-8)
