"""Block scores on disk: one float32 a block, beside the plan that was made from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .._files import replace_file
from ..errors import PlanError
from .budget import Scores

__all__ = ["SavedScores", "load_scores", "save_scores", "scores_path"]

FORMAT = "smt_ext.block_scores"
VERSION = "1"


@dataclass(frozen=True)
class SavedScores:
    """What :func:`load_scores` read: scores by module name, and the metric they are in."""

    metric: str
    modules: Mapping[str, Scores]


def scores_path(plan: str | os.PathLike[str]) -> Path:
    """Where the scores of a plan file are: ``plan.json`` has ``plan.scores.safetensors``."""
    return Path(plan).with_suffix(".scores.safetensors")


def save_scores(path: str | os.PathLike[str], scores: Mapping[str, Scores], *, metric: str) -> None:
    """Write scores, rounded to float32; the file appears whole or not at all."""
    layout = {name: {"shape": s.shape, "block_size": s.block_size} for name, s in scores.items()}
    tensors = {name: np.ascontiguousarray(s.values, np.float32) for name, s in scores.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "metric": metric,
        "modules": json.dumps(layout, sort_keys=True),
    }
    with replace_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_scores(path: str | os.PathLike[str]) -> SavedScores:
    """Read what :func:`save_scores` wrote.

    Raises:
        PlanError: no such file, or no usable scores in it; names the file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise PlanError(
                    f"format is {metadata.get('format')!r} {metadata.get('version')!r}, expected "
                    f"{FORMAT!r} {VERSION!r}"
                )
            layout = json.loads(metadata["modules"])
            modules = {
                name: Scores(tuple(entry["shape"]), entry["block_size"], file.get_tensor(name))
                for name, entry in layout.items()
            }
            return SavedScores(metadata["metric"], modules)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, PlanError) as error:
        raise PlanError(f"cannot load block scores from {os.fspath(path)!r}: {error}") from None
