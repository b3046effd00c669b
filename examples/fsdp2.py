"""Fine-tune with SMT on several processes that share one model (FSDP2, fully_shard).

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --output run

Frozen weights, blocks, gradients and moments are all sharded. Plan and patch come first, on the
whole model in each rank's main memory; fully_shard then leaves each rank its part. Run it again with
another number of processes: it goes on from the state in --output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from common import batches_of, device_of_rank, load_model
from torch.distributed.fsdp import fully_shard

import smt_ext
from smt_ext.checkpoint.blocks import load_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a Hugging Face model")
    parser.add_argument("--plan", help="plan.json; made on a few batches if not given")
    parser.add_argument("--budget", default="2%")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="run")
    args = parser.parse_args()

    device = device_of_rank()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = load_model(args.model)
    batches = batches_of(model, rank=dist.get_rank())

    if args.plan:
        plan = load_plan(args.plan)
    else:
        plan = smt_ext.make_plan(
            model, batches, budget=args.budget, block_size=args.block_size, num_batches=4
        )
    smt_ext.patch(model, plan)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = smt_ext.SparseAdamW(model, lr=args.lr, max_grad_norm=1.0)

    state, done = Path(args.output) / "state", 0
    if state.exists():
        done = smt_ext.load_training_state(state, model, optimizer)["step"]
    for step in range(done, done + args.steps):
        batch = {name: value.to(device) for name, value in batches[step % len(batches)].items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)

    # All ranks call; rank 0 writes.
    smt_ext.save_training_state(state, model, optimizer, step=done + args.steps)
    smt_ext.save_blocks(model, Path(args.output) / "blocks")
    # Before the interpreter ends, gloo's threads must have let go of the last tensors.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
