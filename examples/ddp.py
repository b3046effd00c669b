"""Fine-tune with SMT on several processes, each with a whole model (DistributedDataParallel).

    torchrun --standalone --nproc-per-node 2 examples/ddp.py --output blocks

Every rank plans on its own batches and gets the same plan; only the gradients of the blocks travel.
The model is a random tiny Llama unless --model names one.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from common import batches_of, device_of_rank, load_model
from torch.nn.parallel import DistributedDataParallel

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

    device = device_of_rank()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = load_model(args.model).to(device)
    batches = batches_of(model, rank=dist.get_rank())

    plan = smt_ext.make_plan(
        model, batches, budget=args.budget, block_size=args.block_size, num_batches=4
    )
    smt_ext.patch(model, plan)
    optimizer = smt_ext.SparseAdamW(model, lr=args.lr, max_grad_norm=1.0)
    wrapped = DistributedDataParallel(model)

    for step in range(args.steps):
        batch = {name: value.to(device) for name, value in batches[step % len(batches)].items()}
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)

    if dist.get_rank() == 0:
        print(smt_ext.status(model))
        smt_ext.save_blocks(model, args.output)
    dist.barrier()
    # Before the process group: else the model would be the last to hold it, and would join gloo's
    # threads with the GIL held, which one of them may be waiting for.
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
