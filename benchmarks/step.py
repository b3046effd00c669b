"""Training steps of a language model: time, memory and bytes saved for backward, beside the peers.

    python benchmarks/step.py --dtype bf16 --threads 2
    python benchmarks/step.py --workload cuda          (not yet run on a GPU)
    python benchmarks/step.py --workload cuda-8b       (not yet run on a GPU)

On the CPU the model is SmolLM2-135M; on a GPU it has the shape of Llama-3.2-1B or Llama-3-8B and
random weights, so that nothing is downloaded. With 8B all methods checkpoint activations. "quick" is
a trial on the CPU in seconds, whose numbers mean nothing.

Each method lives in a process of its own and steps when told to, one at a time. The floor and SMT
(on a GPU the floor alone, for its memory's sake) live through the whole run; the peers come one
after the other and step in turns with those, so that every ratio is of medians from the same minutes.
With 8B each method has the GPU to itself, the floor first. A method that fails, of memory for one,
leaves a row that says so; the record is written anew after each.
Weights are those of the model as it was loaded, quantised where the method's base is.
The floor freezes everything but the value projection of layer 0: no method that trains a part of all
layers can have a cheaper backward. Peak memory is what the process holds at most while it steps,
above what it held with the model loaded: resident bytes on the CPU, those of tensors on a GPU.

"x floor" is the median, over the turns, of the method's time by the floor's in the same turn. On the
CPU all methods reuse freed memory (smt_ext.memory.keep_freed_memory, as `smt-ext train` does):
returned to the system, it costs every one of them a third more time, and most of the noise.
--return-memory measures that.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import (
    CudaMemory,
    HostMemory,
    dtype_of,
    keeps_records,
    print_table,
    require_device,
    save_record,
    seconds_on_cuda,
)
from quantized import quantize_
from torch import Tensor, nn

import smt_ext
from smt_ext.hf.loading import checkpoint_activations, load_model, resolve_model
from smt_ext.memory import SavedBytes, held_tensors, keep_freed_memory

COLUMNS = (
    "method", "trainable %", "seconds", "p20", "p80", "x floor", "weights MB", "peak MB", "saved MB",
)  # fmt: skip
QKV = ["q_proj", "k_proj", "v_proj"]
ALL_LINEAR = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]

# An optimizer, or what steps like one.
Methods = dict[str, Callable[[nn.Module], Any]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained, and where.

    Attributes:
        device: "cpu" or "cuda".
        config: of a Llama with random weights; None for SmolLM2-135M.
        ranks: of adapters on all linear layers, with about as many parameters as the two budgets of
            SMT. qkv_rank: of those on q, k and v, for the smaller budget.
        anchors: how many of the methods live through the whole run, the first ones.
        warm_up: steps of a method that do not count; the first makes the optimizer's state.
        checkpointing: activations are recomputed in backward.
        peers: what is measured beside the anchors and the first method if nobody asks; None for all.
    """

    device: str
    model: str
    config: dict[str, Any] | None
    batch: int
    length: int
    block_size: int
    ranks: tuple[int, int]
    qkv_rank: int
    anchors: int
    warm_up: int
    checkpointing: bool = False
    peers: tuple[str, ...] | None = None


WORKLOADS = {
    "cpu": Workload("cpu", "SmolLM2-135M-Instruct", None, 4, 256, 64, (4, 11), 14, 3, 1),
    "cuda": Workload(
        "cuda",
        "Llama-3.2-1B's shape, random weights",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "tie_word_embeddings": True,
        },
        4, 2048, 256, (16, 42), 70, 1, 3,
    ),
    "cuda-8b": Workload(
        "cuda",
        "Llama-3-8B's shape, random weights",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        4, 2048, 256, (26, 73), 114, 0, 3, checkpointing=True,
        peers=("SMT 0.84 % qkv", "LoRA r=26", "DoRA r=26", "SHiRA r=26", "full fine-tuning"),
    ),
    "quick": Workload(
        "cpu",
        "a tiny Llama, random weights",
        {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        },
        2, 16, 16, (2, 3), 4, 0, 1, checkpointing=True,
        peers=("SMT 0.84 % qkv", "LoRA r=2", "DoRA r=2", "SHiRA r=2", "full fine-tuning"),
    ),
}  # fmt: skip


# What a method's name ends with -> how its frozen base is stored.
QUANTIZED = {"NF4 base": "nf4-double", "int8 base": "int8"}


def load(workload: Workload, dtype: torch.dtype, method: str) -> tuple[nn.Module, int]:
    """The model, and its number of parameters, which packed weights do not tell."""
    model: Any
    if workload.config is None:
        model = load_model(resolve_model("smollm2"), dtype)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        with torch.device(workload.device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**workload.config), dtype=dtype)
    parameters = sum(p.numel() for p in model.parameters())
    for ending, base in QUANTIZED.items():
        if method.endswith(ending):
            quantize_(model, base)
    return model, parameters


def batch(model: nn.Module, workload: Workload, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, workload.length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    ids = ids.to(workload.device)
    return {"input_ids": ids, "labels": ids}


def planning_batches(model: nn.Module, workload: Workload) -> list[dict[str, Tensor]]:
    """Two; planning does not checkpoint activations, hence one sequence each where training does."""
    one = dataclasses.replace(workload, batch=1) if workload.checkpointing else workload
    return [batch(model, one, seed) for seed in (1, 2)]


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


def lora(model: nn.Module, rank: int, targets: list[str], dora: bool) -> torch.optim.Optimizer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=targets)
    return adamw(get_peft_model(model, config))


def shira(model: nn.Module, rank: int, targets: list[str]) -> torch.optim.Optimizer:
    from peft import ShiraConfig, get_peft_model

    return adamw(get_peft_model(model, ShiraConfig(r=rank, target_modules=targets)))


class SpielSteps:
    """SpIEL-AG's optimizer, which also writes into the weights.

    It selects once, in the first step: those measured lie between selections, which are dearer and come
    with one step in four.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        from quality.spiel import Spiel

        targets = {
            name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in QKV
        }  # fmt: skip
        entries = rank * sum(m.in_features + m.out_features for m in targets.values())
        self.spiel = Spiel(model, targets, entries, steps=1000, interval=1000, accumulate=1,
                           lr=1e-4, betas=(0.9, 0.999))  # fmt: skip
        self.param_groups = self.spiel.optimizer.param_groups
        self.zero_grad = self.spiel.optimizer.zero_grad
        self.number = 0
        self.spiel.before_step(0)

    def step(self) -> None:
        self.spiel.optimizer.step()
        self.spiel.after_step(self.number)
        self.number += 1


def methods_of(workload: Workload) -> Methods:
    """Name -> what makes a fresh model trainable and returns its optimizer; the floor is first."""

    def plan_for(
        model: nn.Module, budget: str, targets: tuple[str, ...] | None, **settings: Any
    ) -> smt_ext.BlockPlan:
        settings = {"block_size": workload.block_size, "progress": False, **settings}
        return smt_ext.make_plan(
            model, planning_batches(model, workload), budget=budget, targets=targets, **settings
        )

    def smt(
        model: nn.Module, budget: str, targets: tuple[str, ...] | None, **settings: Any
    ) -> torch.optim.Optimizer:
        smt_ext.patch(model, plan_for(model, budget, targets, **settings))
        return smt_ext.SparseAdamW(model, lr=1e-4)

    qkv = functools.partial(smt, budget="0.84%", targets=("q", "k", "v"))
    recommended = functools.partial(smt, budget="0.84%", targets=None, preset="recommended")
    fine = functools.partial(recommended, budget="2.5%", block_size=16)

    def down_columns(model: nn.Module) -> torch.optim.Optimizer:
        heights = [m.out_features for n, m in model.named_modules() if n.endswith("down_proj")]
        blocks = sum(-(-height // workload.block_size) for height in heights)
        settings = {"metric": "random", "unit": "column", "allocation": "uniform"}
        return smt(model, f"{blocks} blocks", ("down_proj",), **settings)

    def reference_style(model: nn.Module) -> torch.optim.Optimizer:
        from peers.reference_style import patch_reference_style

        patch_reference_style(model, plan_for(model, "0.84%", ("q", "k", "v")))
        return adamw(model)

    methods: Methods = {
        "floor (all frozen)": floor,
        "SMT 0.84 % qkv": qkv,
        "SMT 2.4 % all linear": lambda m: smt(m, "2.4%", ("all-linear",)),
        "SMT 0.84 % qkv, NF4 base": qkv,
        "SMT 0.84 % qkv, int8 base": qkv,
        "reference-style SMT 0.84 %": reference_style,
        "SMT 0.84 % recommended": recommended,
        "SMT 0.84 % recommended, L=16": functools.partial(recommended, block_size=16),
        "SMT, a column of each down_proj": down_columns,
        "SMT 0.84 % recommended, upper half": functools.partial(recommended, depth=0.5),
        "SMT 2.5 % recommended, L=16": fine,
        "SMT 2.5 % recommended, L=16, upper two thirds": functools.partial(fine, depth=0.67),
        "SMT 2.5 % recommended, L=16, upper half": functools.partial(fine, depth=0.5),
    }
    all_linear = [("", rank, ALL_LINEAR) for rank in workload.ranks]
    for where, rank, targets in [(", qkv", workload.qkv_rank, QKV), *all_linear]:
        make = {"rank": rank, "targets": targets}
        methods |= {
            f"LoRA r={rank}{where}": functools.partial(lora, **make, dora=False),
            f"DoRA r={rank}{where}": functools.partial(lora, **make, dora=True),
            f"SHiRA r={rank}{where}": functools.partial(shira, **make),
        }
    methods[f"QLoRA r={workload.qkv_rank}, qkv, NF4 base"] = functools.partial(
        lora, rank=workload.qkv_rank, targets=QKV, dora=False
    )
    methods["SpIEL-AG, qkv"] = functools.partial(SpielSteps, rank=workload.qkv_rank)
    return {**methods, "full fine-tuning": full}


def work(
    connection: Connection,
    method: str,
    workload: Workload,
    dtype: torch.dtype,
    threads: int,
    keep_memory: bool,
) -> None:
    """The life of one method's process: set up, then one step a request.

    A failure is sent in place of an answer, and is the last.
    """
    try:
        live(connection, method, workload, dtype, threads, keep_memory)
    except Exception as error:  # out of memory, or anything else: the other methods go on
        traceback.print_exc()
        connection.send({"failed": f"{type(error).__name__}: {error}"})


def live(
    connection: Connection,
    method: str,
    workload: Workload,
    dtype: torch.dtype,
    threads: int,
    keep_memory: bool,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on_cuda = workload.device == "cuda"
    memory = CudaMemory() if on_cuda else HostMemory()
    model, total = load(workload, dtype, method)
    model.config.use_cache = False
    gc.collect()
    base = memory.held()
    weights = {t.untyped_storage()._cdata: t.untyped_storage() for t in held_tensors(model)}
    weight_bytes = sum(storage.nbytes() for storage in weights.values())
    if keep_memory:
        keep_freed_memory()
    optimizer = methods_of(workload)[method](model)
    if workload.checkpointing:
        checkpoint_activations(model)
    model.train()
    data = batch(model, workload)
    trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])

    def step() -> None:
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    gc.collect()
    with SavedBytes(model) as saved:
        loss = model(**data).loss
    del loss
    facts = {"percent": 100 * trained / total, "saved": saved.bytes, "weights": weight_bytes}
    connection.send({"trainable": trained, **facts})
    memory.reset_peak()
    while connection.recv() == "step":
        if on_cuda:
            seconds = seconds_on_cuda(step)
        else:
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
        connection.send((seconds, memory.peak() - base))


@dataclasses.dataclass
class Runner:
    method: str
    process: Any
    connection: Connection
    facts: dict[str, Any]
    seconds: list[float]
    peaks: list[int]


class MethodFailed(Exception):
    """A method's process gave up; the text is its reason."""


def start(
    method: str, workload: Workload, dtype: torch.dtype, threads: int, keep_memory: bool
) -> Runner:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=work, args=(theirs, method, workload, dtype, threads, keep_memory), daemon=True
    )
    process.start()
    theirs.close()
    return Runner(method, process, ours, answer(ours), [], [])


def answer(connection: Connection) -> Any:
    try:
        message = connection.recv()
    except EOFError:
        raise MethodFailed("its process ended without a word") from None
    if isinstance(message, dict) and "failed" in message:
        raise MethodFailed(message["failed"])
    return message


def take_turns(runners: list[Runner], steps: int, warm_up: int) -> None:
    """One step of each in turn; the first turns, which make the optimizer's state, are not kept."""
    for turn in range(steps + warm_up):
        for runner in runners:
            runner.connection.send("step")
            seconds, top = answer(runner.connection)
            if turn >= warm_up:
                runner.seconds.append(seconds)
                runner.peaks.append(top)


def stop(runner: Runner) -> None:
    runner.connection.send("stop")
    runner.process.join()


def row_of(runner: Runner, floor_seconds: list[float]) -> dict[str, Any]:
    """``floor_seconds``: of the same turns, of others if the floor had its own, empty if it failed."""
    ordered = sorted(runner.seconds)
    ratios = [ours / floor for ours, floor in zip(runner.seconds, floor_seconds, strict=False)]
    return {
        "method": runner.method,
        "trainable": runner.facts["trainable"],
        "trainable %": round(runner.facts["percent"], 2),
        "seconds": round(statistics.median(ordered), 3),
        "p20": round(ordered[round(0.2 * (len(ordered) - 1))], 3),
        "p80": round(ordered[round(0.8 * (len(ordered) - 1))], 3),
        "x floor": round(statistics.median(ratios), 3) if ratios else "",
        "weights MB": round(runner.facts["weights"] / 1e6),
        "peak MB": round(max(runner.peaks) / 1e6),
        "saved MB": round(runner.facts["saved"] / 1e6, 1),
        "samples": runner.seconds,
    }


def measured(
    names: list[str],
    anchor_names: list[str],
    workload: Workload,
    setup: tuple[Any, ...],
    steps: int,
) -> Iterator[dict[str, Any]]:
    """A row for each method; with anchors, theirs come last, when all their turns are known.

    Without anchors the first of ``names`` is the floor.
    """
    anchors = [start(name, *setup) for name in anchor_names]
    take_turns(anchors, steps, workload.warm_up)
    floor_seconds: list[float] = []
    for method in names:
        before = len(anchors[0].seconds) if anchors else 0
        try:
            peer = start(method, *setup)
            take_turns([*anchors, peer], steps, workload.warm_up)
        except MethodFailed as error:
            yield {"method": method, "failed": str(error)}
            continue
        stop(peer)
        if anchors:
            floor_seconds = anchors[0].seconds[before:]
        elif method == names[0]:
            floor_seconds = peer.seconds
        yield row_of(peer, floor_seconds)
    for anchor in anchors:
        yield row_of(anchor, anchors[0].seconds)
        stop(anchor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="cpu", choices=list(WORKLOADS))
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=5, help="steps measured a peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--return-memory", action="store_true", help="as without keep_freed_memory")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument("--peers", nargs="*", help="default: those of the workload")
    parser.add_argument("--record", help="name of the record; default by workload and dtype")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    require_device(workload.device)
    dtype = dtype_of(options.dtype)
    workload = dataclasses.replace(
        workload, batch=options.batch or workload.batch, length=options.length or workload.length
    )
    known = list(methods_of(workload))
    anchors, peers = known[: workload.anchors], known[max(1, workload.anchors) :]
    if options.peers is None:
        options.peers = list(workload.peers or peers)
    if unknown := [peer for peer in options.peers if peer not in peers]:
        parser.error(f"--peers: {unknown[0]!r} is none of {', '.join(map(repr, peers))}")
    names = options.peers if anchors else [known[0], *options.peers]
    settings = {**vars(options), "batch": workload.batch, "length": workload.length,
                "model": workload.model, "checkpointing": workload.checkpointing}  # fmt: skip
    name = f"step_{options.dtype}"
    if options.workload != "cpu":
        name = f"step_{options.workload}_{options.dtype}"
    name = options.record or name
    setup = workload, dtype, options.threads, not options.return_memory
    rows: list[dict[str, Any]] = []
    for row in measured(names, anchors, workload, setup, options.steps):
        rows.append(row)
        print(row["method"], row.get("failed", row.get("seconds")), flush=True)
        if keeps_records(options.workload == "quick"):
            save_record(name, settings, rows)
    ordered = [*rows[len(rows) - len(anchors) :], *rows[: len(rows) - len(anchors)]]
    print_table(ordered, (*COLUMNS, "failed"))
    if keeps_records(options.workload == "quick"):
        print(f"record: {save_record(name, settings, ordered)}")


if __name__ == "__main__":
    main()
