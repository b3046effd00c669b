"""Which modules a plan may choose from: patterns over the names of a model's linear layers."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from ..architectures import ALIASES, FUSED, alias_of
from ..errors import PlanError
from ..layouts import SUPPORTED, Matrix, is_supported, matrices, tied_weights, why_not_called
from ..plan import kind_of
from ..quantization import why_unusable

__all__ = ["matches_name", "select_parameters", "select_targets", "upper_layers"]

logger = logging.getLogger("smt_ext")


def select_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, Matrix]:
    """The linear layers that ``targets`` names, in the model's order.

    Args:
        targets: one pattern or several. A pattern is an alias (``q``, ``k``, ``v``, ``o``, ``qkv``,
            ``attention``, ``mlp``, ``all-linear``), the last part of a module name (``v_proj``), a glob
            over the whole name (``model.layers.1?.*``), or a regular expression (``re:...``).
            ``qkv`` also finds matrices that hold all three, such as GPT-2's ``c_attn``.
            ``all-linear`` takes every linear whose weight is not shared with another module, and
            leaves out the output head.

    Raises:
        PlanError: nothing that matches can be trained (lists what there is, and what cannot be
            trained), or a matched weight is tied. Quantised layers that cannot train beside others that
            can are left out with a warning.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise PlanError("targets is empty, expected at least one pattern such as 'v_proj'")
    linears = dict(matrices(model))
    tied = tied_weights(model)
    head = _output_head(model)
    chosen: dict[str, Matrix] = {}
    for pattern in patterns:
        matched = [name for name in linears if _matches(pattern, name)]
        if pattern == "all-linear":
            matched = [n for n in matched if n not in tied and linears[n] is not head]
        if not matched:
            raise PlanError(_nothing_matches(model, pattern, linears))
        if unusable := _quantized_otherwise(model, pattern):
            logger.warning(
                "%d layers that target %r matches cannot train and are left out: %s",
                len(unusable), pattern, unusable[0],
            )  # fmt: skip
        for name in matched:
            if name in tied:
                raise PlanError(
                    f"{name!r} shares its weight with {tied[name]!r} (tied embeddings), so training "
                    "blocks of it would change both. Leave it out of the targets, or untie it "
                    "first (config.tie_word_embeddings = False and a cloned weight)."
                )
            matrix = linears[name]
            if (why := why_not_called(matrix)) is not None:
                raise PlanError(f"{name!r} {why}.")
            chosen[name] = matrix
    return {name: module for name, module in linears.items() if name in chosen}


def select_parameters(
    model: nn.Module, patterns: Iterable[str], targets: Iterable[str], *, upper: bool = False
) -> dict[str, nn.Parameter]:
    """Parameters that are to train whole, by name, in the model's order.

    Args:
        patterns: globs over the names of parameters (``*norm*``), or regular expressions
            (``re:...``).
        targets: names of the layers whose blocks compete; their weights are not for choice here.
        upper: leave out what lies in layers below all targets, so that backward ends where it would.

    Raises:
        PlanError: nothing matches (lists what there is), or what matches is a target's weight, shared,
            or none of floating point.
    """
    targets = list(targets)
    linears = dict(matrices(model))
    weights = {id(linears[name].weight): name for name in targets}
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = set()
    for pattern in patterns:
        found = [name for name in named if matches_name(pattern, name)]
        if not found:
            kinds = sorted({".".join(name.split(".")[-2:]) for name in named})
            raise PlanError(f"no parameter matches {pattern!r}. There are: {', '.join(kinds)}.")
        chosen.update(found)
    shared = Counter(id(parameter) for parameter in named.values())
    for name in sorted(chosen):
        parameter = named[name]
        if (target := weights.get(id(parameter))) is not None:
            raise PlanError(
                f"{name!r} is the weight of the target {target!r}, whose blocks are chosen. Take a "
                "narrower pattern in also_train, or leave the layer out of the targets."
            )
        if shared[id(parameter)] > 1:
            raise PlanError(
                f"{name!r} is shared by several modules (tied): leave it out of also_train."
            )
        if not parameter.is_floating_point():
            raise PlanError(
                f"{name!r} is of {parameter.dtype}, and only floating point can train whole: leave it "
                "out of also_train."
            )
    lowest = min((place[1] for n in targets if (place := _layer_of(n))), default=0) if upper else 0
    return {
        name: parameter
        for name, parameter in named.items()
        if name in chosen and ((place := _layer_of(name)) is None or place[1] >= lowest)
    }


def upper_layers(
    model: nn.Module, targets: Mapping[str, Matrix], depth: float
) -> dict[str, Matrix]:
    """The targets in the upper ``depth`` of the model's layers, at least one layer.

    With nothing below that trains, backward ends at the lowest of them.

    Raises:
        PlanError: depth is out of range, or targets are in no layer or in several stacks of layers.
    """
    if not 0 < depth <= 1:
        raise PlanError(
            f"depth is {depth}, expected more than 0 and at most 1, a share of the layers"
        )
    if depth == 1:
        return dict(targets)
    places = {name: _layer_of(name) for name in targets}
    stacks = {place[0] for place in places.values() if place is not None}
    alone = next((name for name, place in places.items() if place is None), None)
    if alone is not None or len(stacks) > 1:
        found = f"{alone!r} is in none" if alone else f"there are {', '.join(sorted(stacks))}"
        raise PlanError(
            f"depth={depth:g} needs targets in one stack of numbered layers, and {found}. Name what is "
            "to train by patterns in targets instead."
        )
    stack = stacks.pop()
    numbers = [
        place[1] for n, _ in matrices(model) if (place := _layer_of(n)) and place[0] == stack
    ]
    count = max(numbers) + 1
    first = count - math.ceil(depth * count)
    kept = {
        n: matrix for n, matrix in targets.items() if (place := places[n]) and place[1] >= first
    }
    if not kept:
        raise PlanError(
            f"depth={depth:g} leaves no target: they are all below layer {first} of {count}. Raise it."
        )
    return kept


def _layer_of(name: str) -> tuple[str, int] | None:
    """(the stack, the layer's number in it) of a module, such as ("model.layers", 7)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def _matches(pattern: str, name: str) -> bool:
    if pattern == "all-linear":
        return True
    if pattern in ALIASES:
        return alias_of(name) in ALIASES[pattern]
    return pattern == kind_of(name) or matches_name(pattern, name)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a glob, or a regular expression behind ``re:``, is a whole name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise PlanError(f"target {pattern!r} is no regular expression: {error}") from None
    return pattern == name or fnmatchcase(name, pattern)


def _nothing_matches(model: nn.Module, pattern: str, linears: Iterable[str]) -> str:
    kinds = sorted({kind_of(name) for name in linears})
    text = (
        f"no linear layer matches target {pattern!r}. {type(model).__name__} has: "
        f"{', '.join(kinds) or 'none'}; aliases: {', '.join(ALIASES)}, all-linear."
    )
    fused = [name for name in linears if alias_of(name) in FUSED]
    if fused and pattern in ("q", "k", "v"):
        text += (
            f" It keeps query, key and value in one matrix ({kind_of(fused[0])}): use 'qkv', which "
            "chooses among the blocks of all three."
        )
    return text + _unsupported(model, pattern)


def _unsupported(model: nn.Module, pattern: str) -> str:
    """What the pattern does match, and why it cannot be trained."""
    if unusable := _quantized_otherwise(model, pattern):
        return f" {unusable[0]}."
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2
        if matrix and not is_supported(module) and _matches(pattern, name):
            return (
                f" {name!r} is a {type(module).__name__}, and only exactly {SUPPORTED} can be "
                "trained: another class may compute something else."
            )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and _matches(pattern, name):
            owner = model.get_submodule(name.rpartition(".")[0])
            return (
                f" {name!r} of {type(owner).__name__} holds matrices in one parameter of shape "
                f"{tuple(parameter.shape)}, in a layout that cannot be trained (known are experts "
                "without biases, stored as experts x out x in, on one device). Leave it out, and "
                "train the attention: targets='attention'."
            )
    return ""


def _quantized_otherwise(model: nn.Module, pattern: str) -> list[str]:
    """Quantised layers that match and cannot train: each by name, and why."""
    return [
        f"{name!r} {why}"
        for name, module in model.named_modules()
        if _matches(pattern, name) and (why := why_unusable(module)) is not None
    ]


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
