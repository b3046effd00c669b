"""The page of a plan or a run: what is on it, that it needs nothing else, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from models import mlp_plan
from smt_ext import BlockPlan, DataError, LayerPlan, PlanError
from smt_ext.cli import entry as cli
from smt_ext.planning.score_file import load_scores, scores_path
from smt_ext.report.figures import color_of, curve, mosaic
from smt_ext.report.run_record import read_record, values_of
from smt_ext.report.write import write_report

FIGURES = {"share_by_kind", "score_by_depth", "block_maps", "loss", "eval_loss"}


class Page(HTMLParser):
    """Ids, and everything that would make a browser fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value is not None:
                self.ids.append(value)
            if (
                name in ("src", "href", "xlink:href", "srcset", "data", "action")
                and value is not None
            ):
                self.fetched.append(value)


def test_every_figure_is_there(page: Path) -> None:
    found = Page(page.read_text("utf-8"))
    assert set(found.ids) == FIGURES
    for figure in figures_of(page):
        assert "<svg" in figure


def figures_of(page: Path) -> list[str]:
    """The SVG files within the page."""
    begin = "data:image/svg+xml;base64,"
    links = Page(page.read_text("utf-8")).fetched
    found = [b64decode(link[len(begin) :]).decode() for link in links if link.startswith(begin)]
    assert len(found) == len(FIGURES)
    return found


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text("utf-8")
    assert all(link.startswith("data:") for link in Page(text).fetched)
    assert "@import" not in text
    assert "<script" not in text
    for figure in figures_of(page):
        links = re.findall(r'(?:href="|url\()([^")]+)', figure)
        assert links
        assert all(link.startswith(("#", "data:")) for link in links)


def test_block_maps_show_the_scores_and_the_plan(run: Path) -> None:
    plan = BlockPlan.load(run / "plan.json")
    scores = load_scores(scores_path(run / "plan.json")).modules
    names = sorted(scores)[:3]
    sheet = mosaic(plan, scores, names)
    height, width = (1 + max(scores[n].values.shape[axis] for n in names) for axis in (0, 1))
    assert sheet.shape == (height, 3 * width, 4)
    for index, name in enumerate(names):
        values = scores[name].values
        rows, cols = values.shape
        image = sheet[:rows, width * index : width * index + cols]
        trains = np.abs(image[..., :3] - to_rgb("C1")).max(-1) == 0
        assert {tuple(map(int, at)) for at in np.argwhere(trains)} == set(
            plan.layers[name].blocks if name in plan.layers else ()
        )
        shade, score = image[~trains][:, 0], values[~trains]
        assert len(set(shade)) > 1
        assert (np.diff(shade[np.argsort(score)]) <= 0).all()  # a higher score is darker
        assert (sheet[:, width * (index + 1) - 1, 3] == 0).all()


def test_numbers_on_the_page(page: Path, run: Path) -> None:
    text = page.read_text("utf-8")
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert f"Loss on held-out rows: {losses[-1]:.3g} in the end<" in text


def test_every_evaluation_is_a_point(run: Path) -> None:
    losses = values_of(read_record(run)[-1], "eval_loss")
    (line,) = curve("nats a token", losses).axes[0].lines
    steps, values = line.get_data()
    assert list(steps) == [0, 4, 8, 12]
    assert list(values) == list(losses.values())


def test_an_unfinished_run_shows_what_it_has(run: Path, tmp_path: Path) -> None:
    """The log of its last checkpoint."""
    leave = shutil.ignore_patterns("smt_blocks.json")
    shutil.copytree(run, tmp_path / "run", ignore=leave)
    (tmp_path / "run" / "trainer_state.json").unlink()
    text = write_report(tmp_path / "run", tmp_path / "out").read_text("utf-8")
    assert set(Page(text).ids) == FIGURES


def test_a_plan_alone(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "plan.json", tmp_path / "p.json")
    page = write_report(tmp_path / "p.json")
    assert page == tmp_path / "p-report" / "index.html"
    text = page.read_text("utf-8")
    found = set(Page(text).ids)
    assert {"share_by_kind", "block_maps"} <= found
    assert not found & {"score_by_depth", "loss"}


def test_names_cannot_break_the_page(run: Path, tmp_path: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["provenance"]["budget"] = "</script><script>alert(1)</script>"
    name, layer = next(iter(plan["layers"].items()))
    plan["layers"] = {f"{name}</script><script>alert(2)</script>": layer}
    plan["input_groups"] = []
    del plan["fingerprint"]
    (tmp_path / "<b>.json").write_text(json.dumps(plan))
    text = write_report(tmp_path / "<b>.json", tmp_path / "out").read_text("utf-8")
    for number in (1, 2):
        assert f"alert({number})" in text
        assert f"alert({number})</script>" not in text
    assert "<title>&lt;b&gt;</title>" in text


def test_the_same_run_gives_the_same_page(page: Path, run: Path, tmp_path: Path) -> None:
    again = write_report(run, tmp_path / "again")
    assert again.read_text("utf-8") == page.read_text("utf-8")


def test_every_kind_of_the_usual_models_has_a_colour() -> None:
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len({color_of(kind) for kind in kinds}) == 7
    assert color_of("something_else") == "C7"


@pytest.mark.parametrize("damage", ["cut off", "another plan's", "another format"])
def test_unusable_scores_are_refused(run: Path, tmp_path: Path, damage: str) -> None:
    plan = tmp_path / "plan.json"
    shutil.copy(run / "plan.json", plan)
    source = scores_path(run / "plan.json").read_bytes()
    if damage == "another plan's":
        loaded = BlockPlan.load(plan)
        name, layer = next(iter(loaded.layers.items()))
        other = {"x." + name: layer}
        BlockPlan(other).save(plan)
    else:
        source = (
            source[:-40]
            if damage == "cut off"
            else source.replace(b"block_scores", b"block_somethi"[:12])
        )
    scores_path(plan).write_bytes(source)
    with pytest.raises(PlanError, match="scores"):
        write_report(plan)
    assert not (tmp_path / "plan-report").exists()


def test_bad_input(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no plan"):
        write_report(tmp_path)
    with pytest.raises(PlanError, match="cannot load a block plan"):
        write_report(tmp_path / "none.json")
    shutil.copy(run / "plan.json", tmp_path / "plan.json")
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(DataError, match="has a damaged file"):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["report", str(run), "--output", str(out)]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "cannot load a block plan" in capsys.readouterr().err


def test_a_given_plan_takes_its_scores_along(run: Path, tmp_path: Path) -> None:
    command = json.loads((run / "command.json").read_text())["arguments"]
    out = ["--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--overwrite", "true"]
    plan = run / "plan.json"
    assert cli.main(["train", *command, *out, "--plan", str(plan)]) == 0
    taken = scores_path(tmp_path / "run" / "plan.json")
    assert taken.read_bytes() == scores_path(plan).read_bytes()
    bare = tmp_path / "bare.json"
    shutil.copy(plan, bare)
    assert cli.main(["train", *command, *out, "--plan", str(bare)]) == 0
    assert not taken.exists()


def test_a_run_that_went_on_is_read_from_where_it_came_furthest(tmp_path):
    mlp_plan().save(tmp_path / "plan.json")
    for folder, step in ((tmp_path, 3), (tmp_path / "checkpoint-5", 5)):
        folder.mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [{"step": step, "loss": 1.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert values_of(read_record(tmp_path)[-1], "loss") == {5: 1.0}


@pytest.mark.parametrize("state", ["[]", '{"global_step": 1, "log_history": [3]}'])
def test_a_damaged_log_is_named(tmp_path: Path, state: str) -> None:
    BlockPlan({"0": LayerPlan((32, 32), 16, ((0, 0),))}).save(tmp_path / "plan.json")
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(DataError, match="has a damaged file"):
        write_report(tmp_path)


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--output=~/page``, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    BlockPlan({"0": LayerPlan((32, 32), 16, ((0, 0),))}).save(tmp_path / "plan.json")
    assert cli.main(["report", "~/plan.json", "--output=~/page"]) == 0
    assert (tmp_path / "page" / "index.html").exists()
