"""What is run: a YAML matrix, the trials it stands for, and the learning rates they are given."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quantized import BASES
from smt_ext.errors import DataError
from smt_ext.planning.scoring import METRICS

__all__ = ["OPTIONS", "TASKS", "Choice", "Matrix", "Trial", "Wanted", "load_matrix"]

TASKS = ("math", "commonsense", "stories")
# Method -> the fields that mean something to it beside those of every trial.
METHODS: dict[str, tuple[str, ...]] = {
    "base": (),  # the model as it is
    "full": (),
    "smt": (
        "budget",
        "targets",
        "metric",
        "block_size",
        "plan_batches",
        "unit",
        "allocation",
        "depth",
        "also_train",
        "also_lr",
        "matrix_lr",
        "optimizer",
        "rms_clip",
        "rotate_every",
    ),
    "dense": ("targets",),  # whole weights of the targets
    "lora": ("budget", "targets"),
    "rslora": ("budget", "targets"),
    "dora": ("budget", "targets"),
    "miss": ("budget", "targets"),
    "shira": ("budget", "targets"),
    "supertuning": ("budget", "targets"),
    "spiel": ("budget", "targets"),
}
SPLITS = ("test", "dev", "plan")
_OWN = ("budget", "targets", "metric", "block_size", "plan_batches", "unit", "allocation", "depth")
# How SMT's blocks train; a trial keeps them where its rate is chosen.
OPTIONS = ("also_train", "also_lr", "matrix_lr", "optimizer", "rms_clip", "rotate_every")
# Left out of a record's name where they are None, as they were before there were such fields.
_LATER = ("unit", "allocation", "depth", "auto", "base", "warmup_steps", *OPTIONS)
# Values of options.
MATRIX_LR = ("gradient", "sqrt_gradient", "weight", "fan_in")
OPTIMIZERS = ("row", "muon")
_WITHOUT_BATCHES = ("weight", "random")


@dataclass(frozen=True)
class Trial:
    """One training run, by everything that decides its result; two equal trials are the same run.

    Attributes:
        task: ``math``, ``commonsense``, or ``stories``: held-out rows are unlike those of training.
        method: see METHODS.
        split: ``test`` trains and evaluates on the test sets; ``dev`` trains the same and takes
            the loss of the development rows alone; ``plan`` only chooses blocks.
        seed: of the order of the data, of random blocks and of a method's own initialisation.
        budget: percent of the model's parameters that train.
        targets: pattern of :func:`smt_ext.planning.targets.select_targets`, several joined by ``+``;
            for ``dense`` also ``all-but-embedding``, or ``params:`` and a glob over parameter names.
        metric, block_size, plan_batches, unit, allocation, depth: of :func:`smt_ext.make_plan`; the
            last three None for the paper's. Shares by kind are written ``down_proj:0.5,o_proj:0.2``.
        also_train: globs over names of parameters that train beside the blocks, joined by ``+``.
        also_lr: their peak learning rate; None for the automatic one of their own.
        matrix_lr: rates that differ by matrix, with the same first step: see
            :func:`.methods.matrix_rates`.
        optimizer: of the blocks in place of SparseAdamW: see :mod:`.block_optimizers`.
        rms_clip: bound on the root mean square of a matrix's update (StableAdamW).
        rotate_every: steps after which other blocks train: see :mod:`.rotation`.
        lr: peak learning rate; None while it is not chosen.
        auto: the peak learning rate as a multiple of the plan's automatic one; for SMT, without lr.
        base: how the frozen weights are stored: see benchmarks.quantized.BASES; None for float32.
        limit: most rows of each test set; None for all.
        train_rows: most training rows of each source; None for all.
        warmup_steps: in place of ``warmup``, a share of the steps.
    """

    task: str
    method: str
    split: str
    seed: int
    model: str
    steps: int
    batch_size: int
    max_length: int
    warmup: float
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float
    precision: str
    device: str
    max_new_tokens: int
    train_rows: int | None = None
    limit: int | None = None
    budget: float | None = None
    targets: str | None = None
    metric: str | None = None
    block_size: int | None = None
    plan_batches: int | None = None
    unit: str | None = None
    allocation: str | None = None
    depth: float | None = None
    lr: float | None = None
    auto: float | None = None
    base: str | None = None
    warmup_steps: int | None = None
    also_train: str | None = None
    also_lr: float | None = None
    matrix_lr: str | None = None
    optimizer: str | None = None
    rms_clip: float | None = None
    rotate_every: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("method", METHODS), ("split", SPLITS)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} is {getattr(self, name)!r}, expected {', '.join(known)}")
        needed = METHODS[self.method]
        for name in needed:
            if getattr(self, name) is None and not self._may_lack(name):
                raise DataError(f"method {self.method!r} needs {name!r}")
        if self.metric is not None and self.metric not in METRICS:
            raise DataError(f"metric is {self.metric!r}, expected {', '.join(METRICS)}")
        if self.base is not None and self.base not in BASES:
            raise DataError(f"base is {self.base!r}, expected {', '.join(BASES)} or nothing")
        if self.split == "plan" and self.method != "smt":
            raise DataError(f"method {self.method!r} has no plan: split 'plan' is for 'smt'")
        for name, known in (("matrix_lr", MATRIX_LR), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in (None, *known):
                raise DataError(f"{name} is {getattr(self, name)!r}, expected {', '.join(known)}")
        if self.optimizer == "muon" and self.rms_clip is not None:
            raise DataError("rms_clip is of Adam's update, not for optimizer 'muon'")
        if self.rotate_every is not None and self.rotate_every < 1:
            raise DataError(f"rotate_every is {self.rotate_every}, expected 1 or more")
        if self.auto is not None and (self.method != "smt" or self.lr is not None):
            raise DataError("auto is for method 'smt', without lr")

    def _may_lack(self, field: str) -> bool:
        if field == "plan_batches":
            return self.metric in _WITHOUT_BATCHES and self.auto is None
        return field in _LATER

    @property
    def needs_lr(self) -> bool:
        """Whether a learning rate must still be chosen."""
        given = self.lr is not None or self.auto is not None
        return not given and self.split != "plan" and self.method != "base"

    @property
    def id(self) -> str:
        """Names the record: readable, and different where anything that counts differs."""
        fields = dataclasses.asdict(self)
        fields = {k: v for k, v in fields.items() if v is not None or k not in _LATER}
        text = json.dumps(fields, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        parts = [self.task, self.split, self.base, self.method, self.metric, self.unit]
        parts += [self.allocation, self.targets]
        parts += [None if self.depth is None else f"upper{self.depth:g}"]
        parts += [self.optimizer, self.matrix_lr]
        parts += [None if self.rotate_every is None else f"every{self.rotate_every}"]
        parts += [None if self.budget is None else f"{self.budget:g}", f"s{self.seed}"]
        text = "-".join(part for part in parts if part is not None)
        return re.sub(r"[^A-Za-z0-9_.+-]", "_", text) + f"-{digest}"  # it names a file

    @property
    def of_any_seed(self) -> Trial:
        """What the seeds of one row of a table have in common."""
        return dataclasses.replace(self, seed=0, lr=None)


@dataclass(frozen=True)
class Wanted:
    """A trial, and the table that asks for it."""

    table: str
    trial: Trial


@dataclass(frozen=True)
class Choice:
    """A learning rate, and the development losses that it was chosen by.

    Attributes:
        losses: learning rate -> loss on the development rows; inf where it is not finite.
        at_edge: the best is the smallest or largest of several: a wider grid might do better.
    """

    lr: float
    losses: dict[float, float]

    @property
    def at_edge(self) -> bool:
        return len(self.losses) > 1 and self.lr in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Matrix:
    """What a YAML file asks for.

    Attributes:
        wanted: the trials of all tables, those of the first seed first within a table.
        grid: method -> learning rates to choose from.
        extend: how many rates may be added beyond an end of a grid while the best is at that end.
        reference: the targets and so on that learning rates are chosen at. Its ``budget`` may be a
            list, of which a trial takes the nearest in ratio, and its ``targets`` one, of which a
            trial takes its own, or else the first.
        step_seconds: method -> a guess, for estimates before anything has run.
        fixed_seconds: of loading, planning and evaluating; a guess.
    """

    wanted: tuple[Wanted, ...]
    grid: Mapping[str, tuple[float, ...]]
    reference: Mapping[str, Any]
    step_seconds: Mapping[str, float]
    fixed_seconds: float
    extend: int = 0

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(wanted.table for wanted in self.wanted))

    def of_table(self, table: str) -> list[Trial]:
        return [wanted.trial for wanted in self.wanted if wanted.table == table]

    def dev_trials(self, trial: Trial, records: Mapping[str, Any] | None = None) -> list[Trial]:
        """The runs whose development losses decide the learning rate of ``trial``.

        They depend on its task, method and metric, on which of the reference's budgets is nearest,
        and on its targets if the reference has them: every other target and every block size of a
        method gets the rate that is best for it at the reference. Where all of a grid have records
        and the best is at an end, they go on beyond it.
        """
        if not trial.needs_lr:
            return []
        own = {name: self.reference[name] for name in _OWN if name in self.reference}
        budgets = own.get("budget")
        if trial.budget is not None and isinstance(budgets, list):
            own["budget"] = _nearest(trial.budget, budgets)
        targets = own.get("targets")
        if isinstance(targets, list):
            own["targets"] = trial.targets if trial.targets in targets else targets[0]
        fields = [name for name in METHODS[trial.method] if name not in OPTIONS]
        own = {name: own.get(name) for name in fields} | {"metric": trial.metric}
        if trial.metric in _WITHOUT_BATCHES:
            own["plan_batches"] = None
        at_reference = dataclasses.replace(
            trial, split="dev", seed=self.reference.get("seed", 0), limit=None, **own
        )

        def with_rates(rates: Iterable[float]) -> list[Trial]:
            return [dataclasses.replace(at_reference, lr=lr) for lr in rates]

        rates = sorted(self.grid[trial.method])
        for _ in range(self.extend if len(rates) > 1 else 0):
            losses = _losses(with_rates(rates), records or {})
            if losses is None:
                break
            best = min(rates, key=lambda lr: losses[lr])
            if best == rates[-1]:
                rates.append(_three_digits(best * best / rates[-2]))
            elif best == rates[0]:
                rates.insert(0, _three_digits(best * best / rates[1]))
            else:
                break
        return with_rates(rates)

    def choose(self, trial: Trial, records: Mapping[str, Mapping[str, Any]]) -> Choice | None:
        """The best learning rate of the grid; None while a development run is missing."""
        losses = _losses(self.dev_trials(trial, records), records)
        if not losses or all(math.isinf(loss) for loss in losses.values()):
            return None
        return Choice(min(losses, key=lambda lr: (losses[lr], lr)), losses)

    def resolve(self, trial: Trial, records: Mapping[str, Mapping[str, Any]]) -> Trial | None:
        """``trial`` with its learning rate; None while that is not known."""
        if not trial.needs_lr:
            return trial
        choice = self.choose(trial, records)
        return None if choice is None else dataclasses.replace(trial, lr=choice.lr)


def _losses(
    devs: Iterable[Trial], records: Mapping[str, Mapping[str, Any]]
) -> dict[float, float] | None:
    """Learning rate -> development loss; None while one is missing."""
    losses = {}
    for dev in devs:
        record = records.get(dev.id)
        if record is None:
            return None
        loss = record["held_out_loss"]["dev"]
        assert dev.lr is not None
        losses[dev.lr] = math.inf if loss is None else loss
    return losses


def _nearest(budget: float, budgets: Sequence[float]) -> float:
    return min(budgets, key=lambda one: abs(math.log(budget / one)))


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def load_matrix(
    path: str | os.PathLike[str], only: Sequence[str] = (), tasks: Sequence[str] = ()
) -> Matrix:
    """Read a matrix; ``only`` keeps some of its tables, ``tasks`` the trials of some tasks.

    Raises:
        DataError: not a usable matrix; names the table and the entry.
    """
    name = os.fspath(path)
    try:
        body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"cannot read the matrix {name!r}: {error}") from None
    expected = {"settings", "learning_rates", "tables", "seconds"}
    if not isinstance(body, dict) or not {"settings", "tables"} <= body.keys() <= expected:
        raise DataError(f"{name!r}: expected the keys {', '.join(sorted(expected))}")
    rates = body.get("learning_rates", {})
    grid = {method: tuple(map(float, lrs)) for method, lrs in rates.get("grid", {}).items()}
    budgets = rates.get("reference", {}).get("budget")
    if isinstance(budgets, list) and not (
        budgets and all(isinstance(one, int | float) and one > 0 for one in budgets)
    ):
        raise DataError(
            f"{name!r}: the reference's budgets are {budgets!r}, expected percents above 0"
        )
    targets = rates.get("reference", {}).get("targets")
    if isinstance(targets, list) and not (targets and all(isinstance(one, str) for one in targets)):
        raise DataError(f"{name!r}: the reference's targets are {targets!r}, expected patterns")
    if unknown := set(only) - body["tables"].keys():
        raise DataError(
            f"{name!r} has no table {', '.join(sorted(unknown))}; it has {', '.join(body['tables'])}"
        )
    wanted = []
    for table, entries in body["tables"].items():
        if only and table not in only:
            continue
        trials: dict[Trial, None] = {}
        for number, entry in enumerate(entries):
            for trial in _expand(entry, body["settings"], f"{name}: {table}[{number}]"):
                if trial.needs_lr and not grid.get(trial.method):
                    raise DataError(
                        f"{name}: {table}[{number}]: no lr, and learning_rates has no grid for "
                        f"{trial.method!r}"
                    )
                if not tasks or trial.task in tasks:
                    trials[trial] = None
        wanted += [Wanted(table, trial) for trial in sorted(trials, key=lambda t: t.seed)]
    seconds = body.get("seconds", {})
    return Matrix(
        wanted=tuple(wanted),
        grid=grid,
        reference=rates.get("reference", {}),
        step_seconds=seconds.get("step", {}),
        fixed_seconds=float(seconds.get("fixed", 60)),
        extend=int(rates.get("extend", 0)),
    )


def _expand(entry: Any, settings: Mapping[str, Any], where: str) -> Iterator[Trial]:
    """All combinations of an entry's lists."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a {type(entry).__name__}, expected a mapping")
    fields = {"split": "test", **settings, **entry}
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(Trial)}:
        raise DataError(f"{where}: unknown {', '.join(sorted(unknown))}")
    lists = {key: value if isinstance(value, list) else [value] for key, value in fields.items()}
    for values in itertools.product(*lists.values()):
        one = dict(zip(lists, values, strict=True))
        needed: Iterable[str] = METHODS.get(one.get("method", ""), (*_OWN, *OPTIONS))
        for name in (*_OWN, *OPTIONS):
            if name not in needed:
                one[name] = None
        if one.get("metric") in _WITHOUT_BATCHES and one.get("auto") is None:
            one["plan_batches"] = None
        if one["split"] == "plan":
            one |= {"lr": None, "auto": None, "limit": None}
        try:
            yield Trial(**one)
        except (TypeError, DataError) as error:
            raise DataError(f"{where}: {error}") from None
