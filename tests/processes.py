"""Run a function on several ranks: processes on this machine that talk through gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

# Forked from a server that has imported these once.
_PRELOAD = ["torch.distributed.fsdp", "smt_ext", "transformers.models.llama.modeling_llama"]
_PRELOAD += ["transformers.trainer"]  # the longest of all to import


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 180
) -> list[Any]:
    """``function(rank, *args)`` on every rank of a gloo group; their results in the order of ranks.

    ``function`` is defined at the top of its module. A rank that fails ends the others, and its
    traceback is raised.
    """
    multiprocessing.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    context = mp.start_processes(
        _start, (function, world_size, folder, args), world_size, join=False,
        start_method="forkserver",
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    while not context.join(timeout=max(0.1, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end within {seconds} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _start(
    rank: int, function: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    gc.freeze()  # what the server has imported: see tests/conftest.py
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {  # as torchrun has it, for libraries that look there
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=90),
    )
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        gc.collect()  # a wrapped model must end before its process group: see examples/ddp.py
        dist.destroy_process_group()
