"""Parameters that no checkpoint of a model has: a new head, an embedding that was grown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["fresh_parameters"]


def fresh_parameters(model: Any) -> Iterator[tuple[str, str]]:
    """Parameters that the checkpoint of the model's name does not have as they are, by name, and why.

    transformers marks what it has loaded; :meth:`resize_token_embeddings` keeps the mark, and the
    checkpoint's own configuration tells. None where that is not there any more.
    """
    config: Any = getattr(model, "config", None)
    marked = "_is_hf_initialized"
    source = getattr(config, "name_or_path", "")
    named = dict(model.named_parameters())
    if not source or not any(hasattr(p, marked) for p in named.values()):
        return
    # Made by the model itself, the same each time; quantisers make parameters anew.
    made = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), r"\.blocks$"]
    for name, parameter in {} if getattr(model, "is_quantized", False) else named.items():
        if not hasattr(parameter, marked) and not any(re.search(key, name) for key in made):
            yield name, f"is not in the checkpoint {source!r}"
    try:
        revision = getattr(config, "_commit_hash", None)
        saved = type(config).from_pretrained(source, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return
    rows, before = (getattr(c.get_text_config(), "vocab_size", None) for c in (config, saved))
    if rows != before:
        embedding = model.get_input_embeddings().weight
        name = next(name for name, parameter in named.items() if parameter is embedding)
        yield name, f"has {rows} rows, and the checkpoint {source!r} {before}"
