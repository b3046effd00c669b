"""What a plan file or the directory of a run holds, read for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.blocks import load_plan
from ..config import load_config
from ..errors import DataError, PlanError
from ..evaluation_log import Evaluation, read_evaluations
from ..plan import BlockPlan
from ..planning.score_file import SavedScores, load_scores, scores_path
from ..train import Workspace

__all__ = ["RunRecord", "read_record"]


@dataclass(frozen=True)
class RunRecord:
    """A plan, and where there was a run, what it left.

    Attributes:
        name: of the file or directory.
        plan: the plan. scores: the block scores beside it, if there are any.
        metrics: a line a step. evaluations: on the held-out rows, by step.
        results, config: of the run; None where there are none.
    """

    name: str
    plan: BlockPlan
    scores: SavedScores | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    results: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


def read_record(path: Path) -> RunRecord:
    """Read a plan file, or the directory of a run that may be unfinished.

    Raises:
        PlanError, DataError: a file that is missing, damaged or does not fit the plan; names it.
    """
    if not path.is_dir():
        plan = load_plan(path)
        return RunRecord(path.stem, plan, _scores_of(plan, scores_path(path)))
    run = Workspace(path)
    if not run.plan.exists():
        raise PlanError(
            f"{str(path)!r} holds no plan.json, expected a plan file or a run's directory"
        )
    plan = load_plan(run.plan)
    metrics = run.metrics.read_text("utf-8").splitlines() if run.metrics.exists() else []
    try:
        return RunRecord(
            name=path.absolute().name,
            plan=plan,
            scores=_scores_of(plan, run.scores),
            metrics=tuple(json.loads(line) for line in metrics),
            evaluations=tuple(read_evaluations(run.evaluations)),
            results=json.loads(run.results.read_text("utf-8")) if run.results.exists() else None,
            config=load_config(run.config) if run.config.exists() else None,
        )
    except json.JSONDecodeError as error:
        raise DataError(f"the run in {str(path)!r} has a damaged file: {error}") from None


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
