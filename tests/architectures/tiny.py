"""Tiny random models of the architectures that smt_ext is tested with; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 128
CLASSES = 3

Batch = dict[str, Tensor]


def text(seed: int) -> Batch:
    """A language model's batch: two sequences of 12 tokens, labels are the tokens."""
    ids = _tokens(seed, 12)
    return {"input_ids": ids, "labels": ids}


def translation(seed: int) -> Batch:
    """An encoder-decoder's batch: labels of another length than the input."""
    return {"input_ids": _tokens(seed, 12), "labels": _tokens(seed + 1000, 7)}


def classified_text(seed: int) -> Batch:
    return {"input_ids": _tokens(seed, 12), "labels": torch.tensor([0, 2])}


def classified_image(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def _tokens(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # The first ids are special tokens (padding, end) in some architectures.
    return torch.randint(4, VOCABULARY, (2, length), generator=generator)


@dataclass(frozen=True)
class Architecture:
    """How to build one, what to feed it, and what the documentation's table adds to it."""

    name: str
    model_type: str
    config: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    batch: Callable[[int], Batch] = text
    note: str = ""

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same random model at every call, in eval mode."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, self.auto).from_config(config)
        # Some start with zeros (biases, routers), which would hide a mistake.
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        return model.to(dtype).eval()

    def load(self, folder: Any) -> nn.Module:
        """A checkpoint as a user without smt_ext loads it."""
        model: nn.Module = getattr(transformers, self.auto).from_pretrained(folder, dtype="auto")
        return model.eval()


# 48 is no multiple of the tests' block size: ragged edges in all of them.
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
}

ARCHITECTURES = (
    Architecture("Llama", "llama", _GROUPED),
    Architecture("Qwen2", "qwen2", _GROUPED),
    Architecture("Gemma", "gemma", {**_GROUPED, "head_dim": 16}),
    Architecture("Phi", "phi", _DECODER),
    Architecture("Phi-3", "phi3", _GROUPED, note="q, k, v fused; gate and up fused"),
    Architecture(
        "GPT-2",
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        note="weights stored transposed; q, k, v fused",
    ),
    Architecture("GPT-NeoX (Pythia)", "gpt_neox", _DECODER, note="q, k, v fused, per head"),
    Architecture(
        "BLOOM",
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "n_layer": 2,
            "n_head": 4,
            "pad_token_id": 0,
        },
        note="q, k, v fused, per head",
    ),
    Architecture(
        "OPT",
        "opt",
        {
            **_DECODER,
            "ffn_dim": 80,
            "word_embed_proj_dim": 32,
            "pad_token_id": 1,
            "bos_token_id": 2,
        },
    ),
    Architecture(
        "Mixtral",
        "mixtral",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Architecture(
        "Qwen3-MoE",
        "qwen3_moe",
        {
            **_GROUPED,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    Architecture(
        "T5",
        "t5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        translation,
        note="cross-attention's k and v of all layers share their gathered columns",
    ),
    Architecture(
        "BERT, classification",
        "bert",
        _ENCODER,
        "AutoModelForSequenceClassification",
        classified_text,
    ),
    Architecture(
        "RoBERTa, classification",
        "roberta",
        _ENCODER,
        "AutoModelForSequenceClassification",
        classified_text,
    ),
    Architecture(
        "DistilBERT, classification",
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": CLASSES,
        },
        "AutoModelForSequenceClassification",
        classified_text,
    ),
    Architecture(
        "ViT, classification",
        "vit",
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": CLASSES,
        },
        "AutoModelForImageClassification",
        classified_image,
        note="the patch convolution stays frozen",
    ),
)
