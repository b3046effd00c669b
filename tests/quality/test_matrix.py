"""What a matrix stands for, how learning rates are chosen, and when a difference is one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.quality.estimates import Line
from benchmarks.quality.frontier import draw, points
from benchmarks.quality.matrix import Trial, load_matrix
from benchmarks.quality.plans import of_files, title
from benchmarks.quality.rates import cells, measured
from benchmarks.quality.run import RECORDS, load_records, missing
from smt_ext.errors import DataError

FULL = Path(__file__).parents[2] / "benchmarks" / "quality" / "matrix.yaml"


def a_test_trial(**fields) -> Trial:
    return next(
        w.trial
        for w in load_matrix(FULL).wanted
        if all(getattr(w.trial, name) == value for name, value in fields.items())
    )


def with_reference(folder: Path, **fields: Any) -> Path:
    """The whole matrix with another reference."""
    body = yaml.safe_load(FULL.read_text(encoding="utf-8"))
    body["learning_rates"]["reference"] |= fields
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return path


def test_lists_are_multiplied_and_fields_without_meaning_left_out() -> None:
    matrix = load_matrix(FULL, ["plateau"])
    budgets = {t.budget for t in matrix.of_table("plateau") if t.method == "lora"}
    assert budgets == {0.43, 0.84, 1.26, 2.5, 3.73, 4.91}
    assert len(matrix.wanted) == 4 * 6
    assert all(t.block_size is None for t in matrix.of_table("plateau") if t.method == "lora")
    assert a_test_trial(method="full").budget is None
    assert a_test_trial(metric="random").plan_batches is None


def test_equal_trials_of_two_tables_run_once() -> None:
    matrix = load_matrix(FULL)
    todo = [wanted.trial for wanted in missing(matrix, {})]
    assert len(todo) == len(set(todo)) == len({(t.id) for t in todo})
    assert len(matrix.wanted) > len({w.trial for w in matrix.wanted})


def test_runs_repeated_on_another_machine_are_those_of_the_matrix() -> None:
    wanted = {w.trial.id for w in load_matrix(FULL.with_name("repeat.yaml")).wanted}
    originals = load_records(RECORDS)
    for folder, complete in (("quality_repeat", True), ("quality_repeat_no_amx", False)):
        repeated = load_records(RECORDS.with_name(folder))
        assert repeated
        assert repeated.keys() == wanted if complete else repeated.keys() < wanted
        for name, record in repeated.items():
            assert record["environment"]["CPU"] != originals[name]["environment"]["CPU"]
            assert record["data"] == originals[name]["data"]


def test_another_front_trains_the_same() -> None:
    """On the kind of CPU of the first records: the loss of every step, to the digits that are kept."""
    originals, again = (
        load_records(RECORDS),
        load_records(RECORDS.with_name("quality_repeat_front")),
    )
    front = load_matrix(FULL.with_name("trials") / "front.yaml")
    assert again.keys() == {w.trial.id for w in front.wanted}
    for name, record in again.items():
        for part in ("loss_curve", "held_out_loss", "data"):
            assert record[part] == originals[name][part]


def test_the_id_changes_with_anything_that_decides_the_result() -> None:
    trial = a_test_trial(method="smt")
    assert trial.id == dataclasses.replace(trial).id
    for name, value in {"seed": 7, "steps": 7, "lr": 0.5, "block_size": 16, "limit": 3}.items():
        assert dataclasses.replace(trial, **{name: value}).id != trial.id


def test_the_rate_of_least_development_loss_is_taken() -> None:
    matrix = load_matrix(FULL, ["plateau"])
    trial = a_test_trial(method="smt", metric="mean_abs", seed=2, task="math")
    trial = dataclasses.replace(trial, budget=4.91)
    developments = matrix.dev_trials(trial)
    assert [d.lr for d in developments] == [1e-3, 2e-3, 4e-3]
    assert {(d.split, d.budget, d.seed, d.metric) for d in developments} == {
        ("dev", 3.73, 0, "mean_abs")
    }
    losses = dict(zip(developments, (0.5, 0.4, None), strict=True))  # None: it diverged
    records = {d.id: {"held_out_loss": {"dev": loss}} for d, loss in losses.items()}
    resolved = matrix.resolve(trial, records)
    assert resolved is not None
    assert (resolved.lr, resolved.split, resolved.budget, resolved.seed) == (2e-3, "test", 4.91, 2)
    del records[developments[0].id]
    assert matrix.resolve(trial, records) is None


def test_a_trial_takes_the_rate_of_the_nearest_budget_in_ratio() -> None:
    matrix = load_matrix(FULL)
    chosen = {
        trial.budget: {dev.budget for dev in matrix.dev_trials(trial)}
        for trial in matrix.of_table("plateau")
        if trial.method == "lora"
    }
    small, large = {0.84}, {3.73}
    assert chosen == {0.43: small, 0.84: small, 1.26: small, 2.5: large, 3.73: large, 4.91: large}
    full = a_test_trial(method="full")
    assert {dev.budget for dev in matrix.dev_trials(full)} == {None}
    # By difference 2 would be nearer to 0.84.
    between = dataclasses.replace(a_test_trial(method="lora"), budget=2.0)
    assert {dev.budget for dev in matrix.dev_trials(between)} == large


@pytest.mark.parametrize("budgets", [[], [0.84, 0], ["some"]])
def test_budgets_of_the_reference_are_percents(budgets: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="percents above 0"):
        load_matrix(with_reference(tmp_path, budget=budgets))


def test_a_trial_takes_the_rate_of_its_own_targets_where_there_is_one(tmp_path: Path) -> None:
    matrix = load_matrix(with_reference(tmp_path, targets=["qkv", "k"]))
    trial = a_test_trial(method="smt", metric="mean_abs")
    of = {
        targets: {d.targets for d in matrix.dev_trials(dataclasses.replace(trial, targets=targets))}
        for targets in ("qkv", "k", "q", "mlp")
    }
    assert of == {"qkv": {"qkv"}, "k": {"k"}, "q": {"qkv"}, "mlp": {"qkv"}}
    assert {d.targets for d in matrix.dev_trials(a_test_trial(method="full"))} == {None}


@pytest.mark.parametrize("targets", [[], ["qkv", 3]])
def test_targets_of_the_reference_are_patterns(targets: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reference's targets are"):
        load_matrix(with_reference(tmp_path, targets=targets))


def test_a_grid_goes_on_beyond_an_end_that_is_best() -> None:
    matrix = load_matrix(FULL, ["plateau"])
    trial = a_test_trial(method="smt", metric="mean_abs", seed=0, task="math")

    def rates(losses: dict[float, float]) -> list[float]:
        one = matrix.dev_trials(trial)[0]
        records = {
            dataclasses.replace(one, lr=lr).id: {"held_out_loss": {"dev": loss}}
            for lr, loss in losses.items()
        }
        found = [d.lr for d in matrix.dev_trials(trial, records)]
        choice = matrix.choose(trial, records)
        assert (choice is None) == (not set(found) <= losses.keys())
        return found

    grid = {1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.45}
    assert rates(grid) == [1e-3, 2e-3, 4e-3]
    assert rates({1e-3: 0.5, 2e-3: 0.4}) == [1e-3, 2e-3, 4e-3], "not before all have run"
    assert rates(grid | {4e-3: 0.3}) == [1e-3, 2e-3, 4e-3, 8e-3]
    assert rates(grid | {4e-3: 0.3, 8e-3: 0.35}) == [1e-3, 2e-3, 4e-3, 8e-3]
    further = grid | {4e-3: 0.3, 8e-3: 0.2, 1.6e-2: 0.1}
    assert rates(further) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "twice at most"
    assert rates(grid | {1e-3: 0.3}) == [5e-4, 1e-3, 2e-3, 4e-3]


def test_development_runs_come_before_what_needs_them() -> None:
    matrix = load_matrix(FULL)
    todo = [wanted.trial for wanted in missing(matrix, {})]
    for position, trial in enumerate(todo):
        assert all(todo.index(dev) < position for dev in matrix.dev_trials(trial))
    limited = missing(matrix, {}, limit=3)
    assert sum(wanted.table != "learning rate" for wanted in limited) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{method: smt}", "method 'smt' needs 'budget'"),
        ("{method: nothing}", "method is 'nothing', expected base, full"),
        ("{method: full, batch: 3}", "unknown batch"),
        ("{method: smt, budget: 1, targets: v, metric: odd, block_size: 64, plan_batches: 1}",
         "metric is 'odd'"),
        ("{method: lora, budget: 1, targets: v, lr: null}", "no grid for 'lora'"),
    ],
)  # fmt: skip
def test_bad_entries_are_named(text: str, message: str, tmp_path: Path) -> None:
    body = FULL.read_text().partition("learning_rates:")[0]
    path = tmp_path / "matrix.yaml"
    path.write_text(f"{body}\ntables:\n  one:\n    - {{task: math, seed: 0, lr: 1, **}}\n".replace(
        "{task: math, seed: 0, lr: 1, **}", "{task: math, seed: 0, " + text[1:]))  # fmt: skip
    with pytest.raises(DataError, match=message) as raised:
        load_matrix(path)
    assert "one[0]" in str(raised.value)


def line_of(*seeds: tuple[float, str]) -> Line:
    trial = a_test_trial(method="smt", task="math")
    records = {
        seed: {"held_out_loss": {"test": loss}, "right": {"svamp": {"equation": bits}}}
        for seed, (loss, bits) in enumerate(seeds)
    }
    return Line(trial, len(seeds), records)


def test_accuracy_and_its_error() -> None:
    line = line_of((0.5, "1100"))
    value = line.accuracy()
    assert value is not None
    assert value.mean == 0.5
    # The standard error of a share of half of four rows: sqrt(0.5 * 0.5 / 3).
    assert value.error == pytest.approx((0.25 / 3) ** 0.5)
    assert line.loss().error is None


def test_a_difference_inside_its_error_is_none() -> None:
    ours = line_of((0.50, "1" * 30 + "0" * 30), (0.52, "1" * 30 + "0" * 30))
    close = line_of((0.51, "1" * 31 + "0" * 29), (0.51, "1" * 29 + "0" * 31))
    far = line_of((0.70, "0" * 50 + "1" * 10), (0.72, "0" * 50 + "1" * 10))
    assert ours.loss_beyond(close).is_real is False
    assert ours.accuracy_beyond(close).is_real is False
    assert far.loss_beyond(ours).mean == pytest.approx(0.2)
    assert far.loss_beyond(ours).is_real is True
    assert far.accuracy_beyond(ours).is_real is True
    single = line_of((0.7, "10"))
    assert single.loss_beyond(line_of((0.5, "10"))).is_real is None


PLANS = FULL.with_name("plans.yaml")


def test_later_fields_leave_the_names_of_earlier_records_alone() -> None:
    for name, record in load_records(RECORDS).items():
        assert Trial(**record["trial"]).id == name


def test_plans_are_told_apart_by_unit_allocation_depth_and_multiple_of_the_automatic_rate() -> None:
    trial = next(w.trial for w in load_matrix(PLANS).wanted if w.trial.metric == "random")
    assert not trial.needs_lr
    assert trial.plan_batches == 20  # a random plan looks at batches for its rate's sake
    others = (
        {"unit": "row"}, {"allocation": "global"}, {"depth": 0.5}, {"auto": 2.0},
        {"also_train": "*norm*"}, {"matrix_lr": "fan_in"}, {"optimizer": "row"}, {"rms_clip": 1.0},
        {"rotate_every": 20}, {"warmup_steps": 40}, {"allocation": "down_proj:0.5,o_proj:0.25"},
    )  # fmt: skip
    names = {trial.id, *(dataclasses.replace(trial, **other).id for other in others)}
    assert len(names) == 1 + len(others)
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names), "a name of a file"


def test_options_stay_where_a_rate_is_chosen() -> None:
    trial = a_test_trial(method="smt", metric="mean_abs")
    trial = dataclasses.replace(trial, rms_clip=1.0, also_train="*norm*", unit="row")
    for dev in load_matrix(FULL).dev_trials(trial):
        assert (dev.rms_clip, dev.also_train, dev.unit) == (1.0, "*norm*", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected row, muon"),
        ({"matrix_lr": "depth"}, "matrix_lr is 'depth', expected gradient"),
        ({"optimizer": "muon", "rms_clip": 1.0}, "not for optimizer 'muon'"),
        ({"rotate_every": 0}, "rotate_every is 0"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(a_test_trial(method="smt"), **fields)


@pytest.mark.parametrize("name", ["ceilings", "peers", "ideas", "long"])
def test_trials_are_told_apart_and_can_be_listed(name: str) -> None:
    matrix = load_matrix(FULL.with_name("trials") / f"{name}.yaml")
    trials = {wanted.trial for wanted in matrix.wanted}
    assert len({trial.id for trial in trials}) == len(trials)
    titles = {
        (t.task, title(t), t.lr, t.auto, t.also_lr, t.budget)
        for t in trials  # the columns
    }
    assert len(titles) == len(trials)
    _, lacking = of_files([FULL.with_name("trials") / f"{name}.yaml"], {})
    assert set(lacking) == trials


def test_multiples_of_the_automatic_rate_stand_beside_each_other() -> None:
    trial = next(w.trial for w in load_matrix(PLANS).wanted if w.trial.metric == "random")
    records = [
        {
            "trial": dataclasses.asdict(dataclasses.replace(trial, **fields)),
            "held_out_loss": {"dev": loss},
        }
        for fields, loss in (
            ({"auto": 1.0}, 0.4), ({"auto": 2.0}, None), ({"auto": 0.5}, 0.41),
            ({"auto": 4.0, "rms_clip": 1.0}, 0.5), ({"auto": None, "lr": 1e-3}, 0.6),
        )
    ]  # fmt: skip
    header, _, *rows = measured(records).splitlines()
    assert header == "| task | what trains | 0.5 x | 1 x | 2 x | 4 x |"
    assert rows == [f"| math | {title(trial)} | 0.410 | 0.400 | inf |  |"], "one plan has several"


def test_cells_of_the_rule_are_of_the_papers_kind_of_plan() -> None:
    base = next(w.trial for w in load_matrix(PLANS).wanted if w.trial.metric == "random")
    base = dataclasses.replace(base, auto=None, unit=None, allocation=None)

    def found(**fields: Any) -> int:
        trials = [dataclasses.replace(base, lr=lr, **fields) for lr in (1e-3, 2e-3, 4e-3)]
        return len(cells({"trial": dataclasses.asdict(t), "held_out_loss": {"dev": 1.0}}
                         for t in trials))  # fmt: skip

    assert found() == 1
    assert found(allocation="dims") == found(rms_clip=1.0) == found(block_size=16) == 0


def test_the_automatic_rate_is_of_smt_alone_and_not_beside_a_number() -> None:
    trial = next(w.trial for w in load_matrix(PLANS).wanted)
    for wrong in ({"lr": 1e-3}, {"method": "lora"}):
        with pytest.raises(DataError, match="auto is for method 'smt', without lr"):
            dataclasses.replace(trial, **wrong)


def test_a_frontier_has_the_best_run_of_each_method() -> None:
    trial = next(
        w.trial for w in load_matrix(PLANS).wanted
        if (w.trial.metric, w.trial.allocation, w.trial.unit) == ("random", "dims", None)
    )  # fmt: skip
    trial = dataclasses.replace(
        trial, task="math", seed=0, targets="all-linear", block_size=64, budget=0.84
    )
    runs = [
        ({"auto": 1.0}, 0.40, 344e6), ({"auto": 2.0}, 0.39, 345e6), ({"seed": 1}, 0.30, 1),
        ({"budget": 4.91}, 0.31, 1), ({"steps": 60}, 0.32, 1), ({"task": "commonsense"}, 0.33, 1),
        ({"optimizer": "muon"}, 0.34, 1), ({"auto": 4.0}, None, 1),
    ]  # fmt: skip
    records = {
        str(i): {
            "trial": dataclasses.asdict(dataclasses.replace(trial, **fields)),
            "held_out_loss": {"dev": loss}, "memory": {"saved": saved},
        }
        for i, (fields, loss, saved) in enumerate(runs)
    }  # fmt: skip
    times = {"SMT 0.84 % recommended": 1.01}
    assert points(records, "math", times) == {"SMT, L = 64": (0.39, 345e6, 1.01)}
    assert points(records, "math", {})["SMT, L = 64"].time is None
    (figure_axes,) = draw({"math": points(records, "math", {})}).axes[:1]
    assert [text.get_text() for text in figure_axes.texts] == [" SMT, L = 64"]
