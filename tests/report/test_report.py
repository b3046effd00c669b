"""The page of a plan or a run: what is on it, that it needs nothing else, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from models import mlp_plan
from smt_ext import BlockPlan, DataError, PlanError
from smt_ext.cli import entry as cli
from smt_ext.planning.score_file import load_scores, scores_path
from smt_ext.report.figures import PALETTE, color_of, curves, mosaic, style
from smt_ext.report.run_record import read_record
from smt_ext.report.write import write_report

FIGURES = {"share_by_kind", "score_by_depth", "block_maps", "loss", "held_out_loss", "memory"}


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
    assert set(found.ids) >= FIGURES
    assert {path.stem for path in page.parent.glob("*.png")} == FIGURES
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(found.ids) == len(set(found.ids))


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text("utf-8")
    assert all(link.startswith(("#", "data:")) for link in Page(text).fetched)
    assert "@import" not in text
    # References inside the figures point at what is on the page.
    ids = set(Page(text).ids)
    references = set(re.findall(r"url\(#([^)]+)\)", text))
    assert references
    assert references <= ids


def test_colours_follow_the_page(page: Path) -> None:
    text = page.read_text("utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
        assert not colours & set(PALETTE.values())
        assert colours <= {"#000000"}, colours
    assert "<script" not in text
    dark = text.split("prefers-color-scheme: dark)")[1]
    for role in PALETTE:
        assert f"--{role}:" in dark


def test_block_maps_show_the_scores_and_the_plan(runs: tuple[Path, Path]) -> None:
    plan = BlockPlan.load(runs[0] / "plan.json")
    scores = load_scores(scores_path(runs[0] / "plan.json")).modules
    names = sorted(scores)[:3]
    sheet = mosaic(plan, scores, names)
    height, width = (1 + max(scores[n].values.shape[axis] for n in names) for axis in (0, 1))
    assert sheet.shape == (height, 3 * width, 4)
    for index, name in enumerate(names):
        values = scores[name].values
        rows, cols = values.shape
        image = sheet[:rows, width * index : width * index + cols]
        trains = np.abs(image[..., :3] - to_rgb(PALETTE["c2"])).max(-1) == 0
        assert {tuple(map(int, at)) for at in np.argwhere(trains)} == set(
            plan.layers[name].blocks if name in plan.layers else ()
        )
        shade, score = image[~trains][:, 0], values[~trains]
        assert len(set(shade)) > 1
        assert (np.diff(shade[np.argsort(score)]) <= 0).all()  # a higher score is darker
        assert (sheet[:, width * (index + 1) - 1, 3] == 0).all()


def test_numbers_on_the_page(page: Path, runs: tuple[Path, Path]) -> None:
    text = page.read_text("utf-8")
    losses = {}
    for run in runs:
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses[run.name] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    for name in ("mean_abs", "random"):
        assert f">{name}, {losses[name][-1]:.3g}<" in text  # in the legend, by where the run ends
    assert "full, fp32 master" in text


def test_every_evaluation_is_a_point(runs: tuple[Path, Path]) -> None:
    losses = {run.name: read_record(run).values("eval_loss") for run in runs}
    with style():
        axes = curves("nats a token", losses).axes[0]
    for line, made in zip(axes.lines, losses.values(), strict=True):
        steps, values = line.get_data()
        assert list(steps) == [0, 4, 8, 12]
        assert list(values) == list(made.values())


def test_an_unfinished_run_shows_what_it_has(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The log of its last checkpoint, and no estimate: the model's name comes with the blocks."""
    leave = shutil.ignore_patterns("smt_blocks.json")
    shutil.copytree(runs[0], tmp_path / "run", ignore=leave)
    (tmp_path / "run" / "trainer_state.json").unlink()
    text = write_report(tmp_path / "run", tmp_path / "out").read_text("utf-8")
    assert set(Page(text).ids) >= FIGURES - {"memory"}
    assert "names no model. Pass --model" in text


def test_a_plan_alone(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(runs[0] / "plan.json", tmp_path / "p.json")
    page = write_report(tmp_path / "p.json")
    assert page == tmp_path / "p-report" / "index.html"
    text = page.read_text("utf-8")
    found = set(Page(text).ids)
    assert {"share_by_kind", "block_maps"} <= found
    assert not found & {"score_by_depth", "loss", "memory"}
    assert "names no model. Pass --model" in text
    page = write_report(tmp_path / "p.json", model=str(runs[0].parent / "model"), length=64)
    assert "memory" in Page(page.read_text("utf-8")).ids


def test_names_cannot_break_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = json.loads((runs[0] / "plan.json").read_text())
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


def test_the_same_run_gives_the_same_page(
    page: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    again = write_report(runs[0], tmp_path / "again", compare=[runs[1]], batch=4, length=64)
    assert again.read_text("utf-8") == page.read_text("utf-8")


def test_every_kind_of_the_usual_models_has_a_colour() -> None:
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len({color_of(kind) for kind in kinds}) == 7
    assert color_of("something_else") == "quiet"


@pytest.mark.parametrize("damage", ["cut off", "another plan's", "another format"])
def test_unusable_scores_are_refused(runs: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    plan = tmp_path / "plan.json"
    shutil.copy(runs[0] / "plan.json", plan)
    source = scores_path(runs[0] / "plan.json").read_bytes()
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


def test_bad_input(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no plan"):
        write_report(tmp_path)
    with pytest.raises(PlanError, match="cannot load a block plan"):
        write_report(tmp_path / "none.json")
    with pytest.raises(DataError, match="holds no run to compare with"):
        write_report(runs[0], tmp_path / "out", compare=[runs[1] / "plan.json"])
    with pytest.raises(PlanError, match="plan was made for"):
        write_report(runs[0] / "plan.json", tmp_path / "out", model="llama-7b")
    assert not (tmp_path / "out").exists()


def test_command(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["report", str(runs[0]), "--output", str(out), "--compare", str(runs[1])]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "cannot load a block plan" in capsys.readouterr().err


def test_a_given_plan_takes_its_scores_along(runs: tuple[Path, Path], tmp_path: Path) -> None:
    command = json.loads((runs[0] / "command.json").read_text())
    out = ["--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--overwrite", "true"]
    plan = runs[0] / "plan.json"
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
    assert read_record(tmp_path).values("loss") == {5: 1.0}
