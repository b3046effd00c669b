"""Small models, plans and batches that the tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from smt_ext import BlockPlan, LayerPlan


class MLP(nn.Module):
    """Two siblings on one input and a ragged linear behind them; biases on some."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(96, 64, bias=True, dtype=dtype)
        self.up_proj = nn.Linear(96, 64, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(64, 50, bias=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


class Residual(nn.Module):
    """One layer of :class:`Stack`; 80 rows are two and a half blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(96, 80, dtype=dtype)
        self.up_proj = nn.Linear(96, 80, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(80, 96, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))
        return out


class Stack(nn.Module):
    """A few residual layers that compute in one dtype throughout, unlike transformers' norms."""

    def __init__(self, dtype: torch.dtype, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(dtype) for _ in range(layers))
        self.head = nn.Linear(96, 10, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mean loss over the rows of x."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def stack(dtype: torch.dtype = torch.float64, seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack(dtype)


MLP_LAYERS = {
    "gate_proj": LayerPlan(shape=(64, 96), block_size=32, blocks=((0, 0), (0, 2), (1, 2))),
    "up_proj": LayerPlan(shape=(64, 96), block_size=32, blocks=((1, 0), (1, 1))),
    # Ragged in the rows: 50 = 32 + 18.
    "down_proj": LayerPlan(shape=(50, 64), block_size=32, blocks=((0, 1), (1, 0))),
}


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(dtype)


def mlp_plan() -> BlockPlan:
    return BlockPlan(layers=MLP_LAYERS)


def mask_of(layer: LayerPlan) -> Tensor:
    """True at the weight's selected entries, (N, K)."""
    mask = torch.zeros(layer.shape, dtype=torch.bool)
    size = layer.block_size
    for row, col in layer.blocks:
        mask[row * size : (row + 1) * size, col * size : (col + 1) * size] = True
    return mask


def blocks_of(dense: Tensor, layer: LayerPlan) -> Tensor:
    """The selected blocks of a dense (N, K) tensor, zero padded, (S, L, L)."""
    size = layer.block_size
    out = dense.new_zeros(len(layer.blocks), size, size)
    for index, (row, col) in enumerate(layer.blocks):
        block = dense[row * size : (row + 1) * size, col * size : (col + 1) * size]
        out[index, : block.shape[0], : block.shape[1]] = block
    return out


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> nn.Module:
    """A random Llama with grouped-query attention and tied embeddings; nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **overrides,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config)).to(dtype)


def save_checkpoint(folder: Path, **overrides: object) -> Path:
    """A two-layer Llama over single characters, with its tokenizer, as ``from_pretrained`` reads it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_llama(**{"max_position_embeddings": 256, **overrides}).save_pretrained(folder)
    return folder


def llama_plan(
    model: nn.Module, kinds: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
) -> BlockPlan:
    """First and last block of every layer of the given kinds, L = 32, ragged where it falls so."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in kinds:
            rows, cols = -(-module.out_features // 32), -(-module.in_features // 32)
            layers[name] = LayerPlan(
                shape=(module.out_features, module.in_features),
                block_size=32,
                blocks=tuple(sorted({(0, 0), (rows - 1, cols - 1)})),
            )
    return BlockPlan(layers=layers)


def token_batch(seed: int = 0, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids}
