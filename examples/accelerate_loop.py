"""Fine-tune with SMT through accelerate, which wraps the model as its launcher is told.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py        # DDP
    accelerate launch --config_file examples/fsdp2.yaml examples/accelerate_loop.py    # FSDP2

Without a GPU the first runs too, with ACCELERATE_USE_CPU=true in the environment; accelerate itself
has FSDP for accelerators alone (examples/fsdp2.py runs anywhere, and so does this with the tests' shim,
tests/fsdp_on_cpu.py, between the options and the script).
"""

from __future__ import annotations

import argparse

from accelerate import Accelerator
from common import batches_of, expect_all_processes, load_model

import smt_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a Hugging Face model")
    parser.add_argument("--budget", default="2%")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="blocks")
    args = parser.parse_args()

    accelerator = Accelerator()
    expect_all_processes(accelerator.num_processes)
    model = load_model(args.model)
    batches = batches_of(model, rank=accelerator.process_index)
    # Plan and patch before prepare(), which wraps the model.
    plan = smt_ext.make_plan(
        model, batches, budget=args.budget, block_size=args.block_size, num_batches=4
    )
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=args.lr)
    model, optimizer = accelerator.prepare(model, optimizer)

    for step in range(args.steps):
        batch = {
            name: value.to(accelerator.device)
            for name, value in batches[step % len(batches)].items()
        }
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)

    # Under FSDP2 all ranks take part in saving; under DDP the main process is enough.
    if accelerator.is_fsdp2 or accelerator.is_main_process:
        smt_ext.save_blocks(accelerator.unwrap_model(model), args.output)
    accelerator.wait_for_everyone()
    # Before the process group: else the model would be the last to hold it, and would join gloo's
    # threads with the GIL held, which one of them may be waiting for.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
