"""Files that are sealed, and hostile all the same: our exceptions by name, nothing printed raw."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file, save_file

import smt_ext
from models import mlp, mlp_plan
from smt_ext import CheckpointError, PlanError
from smt_ext._files import printable, sha256_of_file
from smt_ext.checkpoint.artifact import sealed
from smt_ext.checkpoint.blocks import load_plan
from smt_ext.checkpoint.delta import apply_delta
from smt_ext.cli import main

ESCAPE = "\x1b]0;owned\x07\0\u202e"
VALUES = [None, [], {}, "x", 3, -1.5, True, [[[[]]]], {"a": {"b": []}}, ESCAPE, 10**30]


@pytest.fixture
def saved(tmp_path):
    model = smt_ext.patch(mlp(), mlp_plan())
    smt_ext.save_blocks(model, tmp_path / "blocks", metadata={"note": ESCAPE, ESCAPE: 1})
    smt_ext.export(model, tmp_path / "delta", "delta")
    optimizer = smt_ext.SparseAdamW(model)
    model(torch.ones(2, 96)).sum().backward()
    optimizer.step()
    smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    return tmp_path


def load_state(folder):
    model = smt_ext.patch(mlp(), mlp_plan())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = smt_ext.SparseAdamW(model)
    try:
        smt_ext.load_training_state(folder, model, optimizer)
    except CheckpointError:
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
        assert not optimizer.state
        raise


LOADS = {
    "blocks": ("smt_blocks.json", lambda f: smt_ext.load_blocks(mlp(), f)),
    "delta": ("delta.json", lambda f: apply_delta(mlp(), f)),
    "state": ("training_state.json", load_state),
}


@pytest.mark.parametrize("kind", LOADS)
def test_every_field_may_be_anything(saved, kind):
    name, load = LOADS[kind]
    path = saved / kind / name
    info = json.loads(path.read_text())
    del info["seal"]
    for field in ("version", "sha256", "base", "plan", "model", "state"):
        if field not in info:
            continue
        for value in VALUES:
            path.write_text(json.dumps(sealed({**info, field: value})))
            with pytest.raises(CheckpointError) as raised:
                load(saved / kind)
            assert str(raised.value).replace("\n", "").isprintable()
        path.write_text(json.dumps(sealed({k: v for k, v in info.items() if k != field})))
        with pytest.raises(CheckpointError):
            load(saved / kind)


@pytest.mark.parametrize("kind", LOADS)
def test_json_that_breaks_parsers(saved, kind):
    name, load = LOADS[kind]
    path = saved / kind / name
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"version": ' + "9" * 5000 + "}",
        '"' + ESCAPE,
        "\xff",
    ):
        path.write_bytes(text.encode("latin1", "replace"))
        with pytest.raises(CheckpointError, match=r"damaged|no smt_ext"):
            load(saved / kind)
        (saved / "plan.json").write_bytes(path.read_bytes())
        with pytest.raises(PlanError):
            load_plan(saved / "plan.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        load(saved / kind)


@pytest.mark.parametrize("kind", LOADS)
def test_tensors_of_other_shapes_or_none(saved, kind):
    name, load = LOADS[kind]
    file = next((saved / kind).glob("*.safetensors"))
    info = json.loads((saved / kind / name).read_text())
    del info["seal"]
    tensors = load_file(file)
    first = next(k for k in tensors if k.endswith((".blocks", ".delta", "/gate_proj")))
    for change in ({first: torch.zeros(1)}, {}):
        save_file({**{k: v for k, v in tensors.items() if k != first}, **change}, file)
        changed = sealed({**info, "sha256": sha256_of_file(file)})
        (saved / kind / name).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError):
            load(saved / kind)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="is missing"):
        load(saved / kind)


def test_nothing_is_printed_raw(saved, capsys):
    assert main(["info", str(saved / "blocks")]) == 0
    out = capsys.readouterr().out
    assert "owned" in out
    assert out.replace("\n", "").isprintable()
    assert printable(ESCAPE) == "\\x1b]0;owned\\x07\\x00\\u202e"
    assert len(printable("x" * 10**6)) < 3000


def test_the_report_runs_no_script():
    template = files("smt_ext.report").joinpath("page.html").read_text("utf-8")
    assert template.index("Content-Security-Policy") < template.index("<title")
    assert "default-src 'none'" in template
    assert "<script" not in template
