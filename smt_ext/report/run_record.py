"""What a plan file or the directory of a run holds, read for a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint.blocks import load_plan
from ..errors import DataError, PlanError
from ..plan import BlockPlan
from ..planning.score_file import SavedScores, load_scores, scores_path

__all__ = ["Log", "read_record", "values_of"]

Log = list[dict[str, Any]]  # a trainer's ``log_history``


def read_record(path: Path) -> tuple[BlockPlan, SavedScores | None, Log]:
    """Read a plan file, or the directory of a run that may be unfinished.

    Returns:
        the plan, the block scores beside it, and what the run's trainer logged.

    Raises:
        PlanError, DataError: a file that is missing, damaged or does not fit the plan; names it.
    """
    file = path / "plan.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise PlanError(
            f"{str(path)!r} holds no plan.json, expected a plan file or a run's directory"
        )
    plan = load_plan(file)
    scores = _scores_of(plan, scores_path(file))
    states = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    try:
        found = [json.loads(file.read_text("utf-8")) for file in states if file.exists()]
        # A run that goes on has come further in a checkpoint than where it ended before.
        log = max(found, key=lambda state: state["global_step"])["log_history"] if found else []
        log = [entry for entry in log if "step" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the run in {str(path)!r} has a damaged file: {error}") from None
    return plan, scores, log


def values_of(log: Log, key: str) -> dict[int, float]:
    """Step -> what was logged there under a key, such as ``loss`` or ``eval_loss``."""
    return {entry["step"]: entry[key] for entry in log if key in entry}


def _scores_of(plan: BlockPlan, path: Path) -> SavedScores | None:
    if not path.exists():
        return None
    scores = load_scores(path)
    for name, layer in plan.layers.items():
        score = scores.modules.get(name)
        if score is None or (score.shape, score.block_size) != (layer.shape, layer.block_size):
            raise PlanError(
                f"the scores in {str(path)!r} are not those of the plan: {name!r} differs. Remove "
                "that file, or plan again."
            )
    return scores
