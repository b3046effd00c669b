"""A README.md beside trained blocks, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from ..nn.patching import plan_of, status

__all__ = ["model_card"]

_BODY = """---
{header}
---

# SMT blocks for {name}

Blocks of weights trained with Sparse Matrix Tuning (He, Li, Jiang, Miller, ICLR 2025), by
`smt_ext`. They replace {trained:,} of the {total:,} parameters
({percent:.3g} %) of the base model; inference costs what the base model costs.

## Use

```python
import smt_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})
smt_ext.load_blocks(model, "this folder, or its name on the hub")
smt_ext.unpatch(model)  # optional: plain nn.Linear modules again, blocks merged
```

## Blocks

```
{plan}
```
{sections}"""
_PLANNING = (
    "metric", "num_batches", "budget", "preset", "block_size", "targets", "unit", "allocation", "seed",
)  # fmt: skip


def model_card(
    model: nn.Module,
    *,
    base_model: str | None,
    training: Mapping[str, Any],
    results: Mapping[str, Any],
) -> str:
    """The text of a model card: how to load the blocks, where the budget went, how they were trained.

    Args:
        model: a patched model.
        base_model: name of the base model.
        training, results: name -> value, for a table each; None is left out.

    Raises:
        PatchError: the model is not patched.
    """
    plan, what = plan_of(model), status(model)
    header = ModelCardData(
        base_model=base_model, library_name="smt_ext", tags=["sparse-matrix-tuning", "smt_ext"]
    )
    sections = ""
    planning = {name: plan.provenance.get(name) for name in _PLANNING}
    for heading, table in (("Planning", planning), ("Training", training), ("Results", results)):
        rows = [f"| {k} | {_text(v)} |\n" for k, v in table.items() if v not in (None, {})]
        if rows:
            sections += f"\n## {heading}\n\n| | |\n|---|---|\n{''.join(rows)}"
    return _BODY.format(
        header=header.to_yaml(),
        name=base_model or type(model).__name__,
        trained=what.trainable,
        total=what.total,
        percent=what.percent,
        base=base_model or "the base model",
        dtype=str(what.modules[0].weight_dtype).removeprefix("torch."),
        plan=plan,
        sections=sections,
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|")
