"""Which modules a plan may choose from: patterns over the names of a model's linear layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .errors import PlanError
from .plan import kind_of

__all__ = ["ALIASES", "select_targets"]

# One word for the usual choices, over the names that architectures give the same matrix.
ALIASES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q", "q_lin", "wq"),
    "k": ("k_proj", "key", "k", "k_lin", "wk"),
    "v": ("v_proj", "value", "v", "v_lin", "wv"),
    "o": ("o_proj", "out_proj", "o", "out_lin", "wo"),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc", "w1", "w2", "w3"),
        *("wi", "wi_0", "wi_1", "lin1", "lin2", "dense_h_to_4h", "dense_4h_to_h"),
    ),
}
ALIASES["qkv"] = ALIASES["q"] + ALIASES["k"] + ALIASES["v"] + ("qkv_proj", "query_key_value")
ALIASES["attention"] = ALIASES["qkv"] + ALIASES["o"]


def select_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers that ``targets`` names, in the model's order.

    Args:
        targets: one pattern or several. A pattern is an alias (``q``, ``k``, ``v``, ``o``, ``qkv``,
            ``attention``, ``mlp``, ``all-linear``), the last part of a module name (``v_proj``), a glob
            over the whole name (``model.layers.1?.*``), or a regular expression (``re:...``).
            ``all-linear`` takes every linear whose weight is not shared with another module, and
            leaves out the output head.

    Raises:
        PlanError: nothing matches (lists what there is), or a matched weight is tied.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise PlanError("targets is empty, expected at least one pattern such as 'v_proj'")
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    tied = _tied(model)
    head = _output_head(model)
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        matched = [name for name in linears if _matches(pattern, name)]
        if pattern == "all-linear":
            matched = [n for n in matched if n not in tied and linears[n] is not head]
        if not matched:
            kinds = sorted({kind_of(name) for name in linears})
            raise PlanError(
                f"no linear layer matches target {pattern!r}. {type(model).__name__} has: "
                f"{', '.join(kinds) or 'none'}; aliases: {', '.join(ALIASES)}, all-linear."
            )
        for name in matched:
            if name in tied:
                raise PlanError(
                    f"{name!r} shares its weight with {tied[name]!r} (tied embeddings), so training "
                    "blocks of it would change both. Leave it out of the targets, or untie it "
                    "first (config.tie_word_embeddings = False and a cloned weight)."
                )
            chosen[name] = linears[name]
    return {name: module for name, module in linears.items() if name in chosen}


def _matches(pattern: str, name: str) -> bool:
    if pattern == "all-linear":
        return True
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise PlanError(f"target {pattern!r} is no regular expression: {error}") from None
    if pattern in ALIASES:
        return kind_of(name) in ALIASES[pattern]
    return pattern in (name, kind_of(name)) or fnmatchcase(name, pattern)


def _tied(model: nn.Module) -> dict[str, str]:
    """Module name -> another parameter's name, for weights that two modules share."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name.removesuffix(".weight"): next(other for other in same if other != name)
        for same in names.values()
        if len(same) > 1
        for name in same
    }


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
