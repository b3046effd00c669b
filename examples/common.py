"""What the examples share: a model and batches."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smt_ext.precision import training_dtype


def load_model(name: str | None) -> nn.Module:
    """The model of a folder, or a tiny random Llama that needs no download."""
    if name is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoModelForCausalLM.from_pretrained(name, dtype=training_dtype(device))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def batches_of(model: nn.Module, rank: int, count: int = 8) -> list[dict[str, Tensor]]:
    """Sequences that count upwards from a random token: something that can be learnt at once.

    Put your tokenized data here, a different part of it on each rank.
    """
    generator = torch.Generator().manual_seed(rank)
    vocabulary = model.config.vocab_size
    batches = []
    for _ in range(count):
        start = torch.randint(0, vocabulary, (4, 1), generator=generator)
        ids = (start + torch.arange(32)) % vocabulary
        batches.append({"input_ids": ids, "labels": ids})
    return batches


def device_of_rank() -> torch.device:
    """The GPU that torchrun gave to this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def expect_all_processes(taking_part: int) -> None:
    """End where the launcher started more processes than train together.

    Without a GPU accelerate lets each of them train alone, unless it is told to use CPUs.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != taking_part:
        raise SystemExit(
            f"{started} processes were started, and accelerate connects {taking_part} of them. "
            "Without a GPU set ACCELERATE_USE_CPU=true."
        )
