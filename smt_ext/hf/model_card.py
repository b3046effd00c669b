"""A README.md beside trained blocks, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from ..nn.patching import plan_of, status

__all__ = ["model_card"]

_BODY = """---
{header}
---

# {title}

Blocks of weights trained with Sparse Matrix Tuning (He, Li, Jiang, Miller, ICLR 2025), by
`smt_ext`. They replace {trained:,} of the {total:,} parameters
({percent:.3g} %) of {base}; inference costs what the base model costs.

## Use

```python
import smt_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base_literal}, dtype={dtype!r})
smt_ext.load_blocks(model, "path/to/this/folder")
smt_ext.unpatch(model)  # optional: plain nn.Linear modules again, blocks merged
```

## Blocks

```
{plan}
```
{sections}"""


def model_card(
    model: nn.Module,
    *,
    base_model: str | None = None,
    title: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    datasets: Iterable[str] | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The text of a model card: how to load the blocks, where the budget went, how they were trained.

    Args:
        model: a patched model.
        base_model: name of the base model; default the one that the model was loaded from.
        title: default ``base_model`` with "SMT blocks for" in front.
        metrics: name -> number or text, such as ``{"eval_loss": 0.41}``.
        hyperparameters: name -> value.
        datasets, license, tags: for the card's header.

    Raises:
        PatchError: the model is not patched.
    """
    plan, what = plan_of(model), status(model)
    base_model = base_model or getattr(getattr(model, "config", None), "name_or_path", "") or None
    base = f"`{base_model}`" if base_model else "the base model"
    header = ModelCardData(
        base_model=base_model,
        library_name="smt_ext",
        license=license,
        datasets=None if datasets is None else list(datasets),
        tags=["sparse-matrix-tuning", "smt_ext", *tags],
    )
    sections = ""
    planned = {k: v for k, v in plan.provenance.items() if k in _PROVENANCE and v not in (None, {})}
    for heading, table in (
        ("Planning", planned),
        ("Training", hyperparameters),
        ("Results", metrics),
    ):
        if table:
            sections += f"\n## {heading}\n\n| | |\n|---|---|\n"
            sections += "".join(f"| {name} | {_text(value)} |\n" for name, value in table.items())
    return _BODY.format(
        header=header.to_yaml(),
        title=title or f"SMT blocks for {base_model or type(model).__name__}",
        trained=what.trainable,
        total=what.total,
        percent=what.percent,
        base=base,
        base_literal=repr(base_model or "the base model"),
        dtype=str(what.modules[0].weight_dtype).removeprefix("torch."),
        plan=plan,
        sections=sections,
    )


_PROVENANCE = (
    "metric", "num_batches", "budget", "preset", "block_size", "targets", "unit", "allocation", "seed",
)  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|")
