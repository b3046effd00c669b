"""Training steps of SmolLM2-135M: time, memory and bytes saved for backward, beside the peers.

    python benchmarks/step.py --dtype bf16 --threads 2

Each method lives in a process of its own and steps when told to, one at a time. The floor and SMT
live through the whole run; the peers come one after the other and step in turns with those, so that
every ratio is of medians from the same minutes. The floor freezes everything but the value
projection of layer 0: no method that trains a part of all layers can have a cheaper backward. Peak
memory is what the process holds at most while it steps, above what it held with the model loaded.

"x floor" is the median, over the turns, of the method's time by the floor's in the same turn. All
methods reuse freed memory (smt_ext.memory.keep_freed_memory, as `smt-ext train` does): returned to
the system, it costs every one of them a third more time, and most of the noise. --return-memory
measures that.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import dtype_of, print_table, save_record
from torch import Tensor, nn

import smt_ext
from smt_ext.loading import load_model, resolve_model
from smt_ext.memory import SavedBytes, keep_freed_memory

BATCH, LENGTH = 4, 256
COLUMNS = ("method", "trainable %", "seconds", "p20", "p80", "x floor", "peak MB", "saved MB")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Step = Callable[[], None]


def batch(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def plan_for(model: nn.Module, budget: str, targets: tuple[str, ...]) -> smt_ext.BlockPlan:
    batches = [batch(model.config.vocab_size, seed) for seed in (1, 2)]
    return smt_ext.make_plan(
        model, batches, budget=budget, block_size=64, targets=targets, progress=False
    )


def smt(model: nn.Module, budget: str, targets: tuple[str, ...]) -> torch.optim.Optimizer:
    smt_ext.patch(model, plan_for(model, budget, targets))
    return smt_ext.SparseAdamW(model, lr=1e-4)


def reference_style(model: nn.Module) -> torch.optim.Optimizer:
    from peers.reference_style import patch_reference_style

    plan = plan_for(model, "0.84%", ("q", "k", "v"))
    patch_reference_style(model, plan)
    return adamw(model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def full(model: nn.Module) -> torch.optim.Optimizer:
    model.requires_grad_(True)
    return adamw(model)


def floor(model: nn.Module) -> torch.optim.Optimizer:
    model.requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    return adamw(model)


def lora(model: nn.Module, rank: int, dora: bool) -> torch.optim.Optimizer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=LORA_TARGETS)
    return adamw(get_peft_model(model, config))


def shira(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    from peft import ShiraConfig, get_peft_model

    return adamw(get_peft_model(model, ShiraConfig(r=rank, target_modules=LORA_TARGETS)))


ANCHORS = ("floor (all frozen)", "SMT 0.84 % qkv", "SMT 2.4 % all linear")
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "floor (all frozen)": floor,
    "SMT 0.84 % qkv": lambda m: smt(m, "0.84%", ("q", "k", "v")),
    "SMT 2.4 % all linear": lambda m: smt(m, "2.4%", ("all-linear",)),
    "reference-style SMT 0.84 %": reference_style,
    "LoRA r=4": lambda m: lora(m, 4, False),
    "LoRA r=11": lambda m: lora(m, 11, False),
    "DoRA r=4": lambda m: lora(m, 4, True),
    "DoRA r=11": lambda m: lora(m, 11, True),
    "SHiRA r=4": lambda m: shira(m, 4),
    "SHiRA r=11": lambda m: shira(m, 11),
    "full fine-tuning": full,
}


def resident() -> int:
    """Resident bytes of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def peak() -> int:
    """Highest resident bytes since the last reset_peak()."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(
    connection: Connection, method: str, dtype: torch.dtype, threads: int, keep_memory: bool
) -> None:
    """The life of one method's process: set up, then one step a request."""
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    model = load_model(resolve_model("smollm2"), dtype)
    model.config.use_cache = False
    gc.collect()
    base = resident()
    optimizer = METHODS[method](model)
    model.train()
    data = batch(model.config.vocab_size)
    trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    total = sum(
        p.numel() for n, p in model.named_parameters() if "blocks" not in n and "lora" not in n
    )

    def step() -> None:
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    gc.collect()
    with SavedBytes(model) as saved:
        loss = model(**data).loss
    del loss
    connection.send({"trainable": trained, "percent": 100 * trained / total, "saved": saved.bytes})
    reset_peak()
    while connection.recv() == "step":
        begin = time.perf_counter()
        step()
        connection.send((time.perf_counter() - begin, peak() - base))


@dataclasses.dataclass
class Runner:
    method: str
    process: Any
    connection: Connection
    facts: dict[str, Any]
    seconds: list[float]
    peaks: list[int]


def start(method: str, dtype: torch.dtype, threads: int, keep_memory: bool) -> Runner:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=work, args=(theirs, method, dtype, threads, keep_memory), daemon=True
    )
    process.start()
    theirs.close()
    return Runner(method, process, ours, ours.recv(), [], [])


def take_turns(runners: list[Runner], steps: int) -> None:
    """One step of each in turn; the first turn, which makes the optimizer's state, is not kept."""
    for turn in range(steps + 1):
        for runner in runners:
            runner.connection.send("step")
            seconds, top = runner.connection.recv()
            if turn > 0:
                runner.seconds.append(seconds)
                runner.peaks.append(top)


def stop(runner: Runner) -> None:
    runner.connection.send("stop")
    runner.process.join()


def row_of(runner: Runner, floor_seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(runner.seconds)
    ratios = [ours / floor for ours, floor in zip(runner.seconds, floor_seconds, strict=True)]
    return {
        "method": runner.method,
        "trainable": runner.facts["trainable"],
        "trainable %": round(runner.facts["percent"], 2),
        "seconds": round(statistics.median(ordered), 3),
        "p20": round(ordered[round(0.2 * (len(ordered) - 1))], 3),
        "p80": round(ordered[round(0.8 * (len(ordered) - 1))], 3),
        "x floor": round(statistics.median(ratios), 3),
        "peak MB": round(max(runner.peaks) / 1e6),
        "saved MB": round(runner.facts["saved"] / 1e6, 1),
        "samples": runner.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=5, help="steps measured a peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--return-memory", action="store_true", help="as without keep_freed_memory")
    peers = [method for method in METHODS if method not in ANCHORS]
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    options = parser.parse_args()
    dtype = dtype_of(options.dtype)

    setup = dtype, options.threads, not options.return_memory
    anchors = [start(method, *setup) for method in ANCHORS]
    take_turns(anchors, options.steps)
    rows = []
    for method in options.peers:
        before = len(anchors[0].seconds)
        peer = start(method, *setup)
        take_turns([*anchors, peer], options.steps)
        stop(peer)
        rows.append(row_of(peer, anchors[0].seconds[before:]))
    rows = [*(row_of(anchor, anchors[0].seconds) for anchor in anchors), *rows]
    for anchor in anchors:
        stop(anchor)
    print_table(rows, COLUMNS)
    settings = {**vars(options), "batch": BATCH, "length": LENGTH, "model": "SmolLM2-135M-Instruct"}
    print(f"record: {save_record(f'step_{options.dtype}', settings, rows)}")


if __name__ == "__main__":
    main()
