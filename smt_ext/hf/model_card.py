"""A README.md beside trained blocks, in the form that model hubs read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from ..checkpoint.artifact import source_of
from ..nn.patching import plan_of, status

__all__ = ["is_as_written", "model_card"]

_BODY = """---
{header}
---

# SMT blocks for {name}

Blocks of weights trained with Sparse Matrix Tuning (He, Li, Jiang, Miller, ICLR 2025), by
`smt_ext`. They replace {what.trainable:,} of the {what.total:,} parameters
({what.percent:.3g} %) of the base model; inference costs what the base model costs.

## Use

```python
{use}
```

## Blocks

```
{plan}
```

## How they were trained

| | |
|---|---|
{rows}"""
_USE = """import smt_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({arguments})
smt_ext.load_blocks(model, "this folder, or its name on the hub")
smt_ext.unpatch(model)  # optional: plain nn.Linear modules again, blocks merged"""
_USE_QUANTIZED = """import smt_ext
from smt_ext.checkpoint.blocks import read_blocks_info
from smt_ext.hf.loading import load_base

folder = "this folder, or its name on the hub"
model = load_base({base!r}, read_blocks_info(folder))  # quantised as it was in training
smt_ext.load_blocks(model, folder)"""
_SEAL = re.compile(rb"\n<!-- smt_ext wrote the text above: ([0-9a-f]{64}) -->\n\Z")
_PLANNING = ("metric", "num_batches", "budget", "preset", "targets", "unit", "allocation")


def model_card(model: nn.Module, training: Mapping[str, Any]) -> str:
    """The text of a model card: how to load the blocks, where the budget went, how they were trained.

    ``training``: settings and results by name, for a table; None is left out.
    """
    plan, what, source = plan_of(model), status(model), source_of(model)
    base_model = source.get("base_model")
    base = base_model or "the base model"
    arguments = [repr(base)]
    if "base_revision" in source:
        arguments.append(f"revision={source['base_revision']!r}")
    dtype = str(what.modules[0].weight_dtype).removeprefix("torch.")
    use = _USE.format(arguments=", ".join([*arguments, f"dtype={dtype!r}"]))
    if "quantization" in source:
        use = _USE_QUANTIZED.format(base=base)
    header = ModelCardData(
        base_model=base_model, library_name="smt_ext", tags=["sparse-matrix-tuning", "smt_ext"]
    )
    facts = {**{name: plan.provenance.get(name) for name in _PLANNING}, **training}
    rows = [f"| {name} | {_text(value)} |\n" for name, value in facts.items() if value is not None]
    text = _BODY.format(
        header=header.to_yaml(),
        name=base_model or type(model).__name__,
        what=what,
        use=use,
        plan=plan,
        rows="".join(rows),
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- smt_ext wrote the text above: {digest} -->\n"


def is_as_written(card: Path) -> bool:
    """Whether a file is a model card that nobody has edited since."""
    content = card.read_bytes()
    if (seal := _SEAL.search(content)) is None:
        return False
    return hashlib.sha256(content[: seal.start()]).hexdigest() == seal[1].decode()


def _text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
