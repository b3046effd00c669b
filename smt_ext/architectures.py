"""What architectures call the same matrix: one table, for targets, input groups and figures."""

from __future__ import annotations

__all__ = ["ALIASES", "FUSED", "ROLES", "SIBLINGS", "alias_of"]

# Role of a matrix in its layer -> ends of module names. Names of one architecture stand at the same
# place of q, k and v, and of gate and up: SIBLINGS reads the tuples across.
ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q", "q_lin", "wq"),
    "k": ("k_proj", "key", "k", "k_lin", "wk"),
    "v": ("v_proj", "value", "v", "v_lin", "wv"),
    "o": (
        *("o_proj", "out_proj", "o", "out_lin", "wo", "attn.c_proj", "crossattention.c_proj"),
        *("self_attn.dense", "attention.dense", "self_attention.dense", "attention.output.dense"),
        *("crossattention.output.dense",),
    ),
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "wi_1"),
    # The first matrix of an MLP without a gate, or gate and up in one.
    "in": (
        *("gate_up_proj", "fc1", "fc_in", "c_fc", "lin1", "wi", "dense_h_to_4h"),
        *("intermediate.dense",),
    ),
    "down": (
        *("down_proj", "w2", "fc2", "fc_out", "mlp.c_proj", "lin2", "DenseReluDense.wo"),
        *("dense_4h_to_h", "output.dense"),
    ),
}
# Query, key and value in one matrix.
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
# Ends that look like one of the above and are another thing.
_OTHER = ("classifier.out_proj", "classification_head.out_proj")

# One word for the usual choices of targets.
ALIASES: dict[str, tuple[str, ...]] = {
    **{role: ROLES[role] for role in ("q", "k", "v", "o")},
    "mlp": ROLES["gate"] + ROLES["up"] + ROLES["in"] + ROLES["down"],
    "qkv": ROLES["q"] + ROLES["k"] + ROLES["v"] + FUSED,
}
ALIASES["attention"] = ALIASES["qkv"] + ALIASES["o"]

# Modules of one parent that read the same tensor; used where a plan does not say which do. A wrong
# guess costs memory, not correctness.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    *zip(ROLES["q"], ROLES["k"], ROLES["v"], strict=True),
    *zip(ROLES["gate"], ROLES["up"], strict=True),
)

_ENDS = sorted(
    {*_OTHER, *(end for ends in ALIASES.values() for end in ends)}, key=len, reverse=True
)


def alias_of(name: str) -> str | None:
    """The end of a module's name that aliases are made of, or None: ``v_proj``, ``mlp.c_proj``.

    Where several fit the longest counts, so that BERT's ``attention.output.dense`` is not taken for
    its MLP's ``output.dense``.
    """
    return next((end for end in _ENDS if f".{name}".endswith(f".{end}")), None)
