"""Law 11: a save replaces nothing that we did not write, and touches no save that is under way."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import smt_ext
from models import mlp, mlp_plan
from smt_ext import CheckpointError, _files
from smt_ext._files import replace_directory, replace_file, settle


def patched():
    return smt_ext.patch(mlp(), mlp_plan())


def save_state(model, folder, **options):
    smt_ext.save_training_state(folder, model, smt_ext.SparseAdamW(model), **options)


SAVES = {
    "blocks": smt_ext.save_blocks,
    "delta": functools.partial(smt_ext.export, format="delta"),
    "state": save_state,
}


def tree(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "hidden", "beside ours", "card"])
def test_a_folder_with_anything_of_the_users_is_left_alone(tmp_path, save, kind):
    target = tmp_path / "saved"
    if kind in ("beside ours", "card"):
        smt_ext.save_blocks(patched(), target, readme="a card")
    target.mkdir(exist_ok=True)
    if kind == "folder":
        (target / "thesis").mkdir()
    elif kind == "link":
        (target / "blocks.safetensors").symlink_to(tmp_path / "elsewhere")
    else:
        name = {"hidden": ".notes", "card": "README.md"}.get(kind, "chapter.tex")
        (target / name).write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved' holds '.*', which smt_ext has not written"):
        save(patched(), target)
    assert tree(tmp_path) == before
    if save is smt_ext.save_blocks:
        save(patched(), target, overwrite=True)
        assert sorted(p.name for p in target.iterdir()) == [
            "blocks.safetensors", "smt_blocks.json", "smt_files.json",
        ]  # fmt: skip


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("held", SAVES)
def test_another_kind_of_ours_is_not_replaced(tmp_path, save, held):
    """An export in the place of the blocks that it is made from, or of a run's state."""
    target = tmp_path / "saved"
    SAVES[held](patched(), target)
    before = tree(tmp_path)
    if save is SAVES[held]:
        save(patched(), target)
        assert tree(tmp_path).keys() == before.keys()
        return
    with pytest.raises(CheckpointError, match=r"saved' holds .*, and .* would take its place"):
        save(patched(), target)
    assert tree(tmp_path) == before


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "blocks")
    for _ in range(2):
        smt_ext.save_blocks(patched(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    smt_ext.load_blocks(mlp(), tmp_path / "link")
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["blocks"]
    (tmp_path / "plan").symlink_to(tmp_path / "disk" / "plan.json")
    mlp_plan().save(tmp_path / "plan")
    assert (tmp_path / "plan").is_symlink()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for use in (
        lambda p: smt_ext.save_blocks(patched(), p),
        lambda p: smt_ext.load_blocks(mlp(), p),
    ):
        for path in (tmp_path / "a", "nul\0"):
            with pytest.raises(CheckpointError):
                use(path)


@pytest.mark.parametrize("name", ["v[12]", "*", "v?", "v.old.1", "v.new", "ü {0} %s", "x" * 250])
def test_names_are_no_patterns(tmp_path, name):
    others = ["v1", "v2", "v", "vv"]
    for other in others:
        smt_ext.save_blocks(patched(), tmp_path / other)
        os.rename(tmp_path / other, tmp_path / f".{other}.old.99999999.")
    with pytest.raises(CheckpointError, match="cannot read"):
        smt_ext.load_blocks(mlp(), tmp_path / name)
    (tmp_path / name).mkdir()
    for _ in range(2):
        smt_ext.save_blocks(patched(), tmp_path / name)
    smt_ext.load_blocks(mlp(), tmp_path / name)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {name, *(f".{other}.old.99999999." for other in others)}
    for other in others:
        smt_ext.load_blocks(mlp(), tmp_path / other)


LIVE = """
import os, sys, time
from smt_ext import _files
plain = os.rename
def rename(a, b):
    plain(a, b)
    print("renamed", flush=True)
    sys.stdin.readline()
os.rename = rename
with _files.replace_directory(sys.argv[1], "a") as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_live_save_is_waited_for_and_a_dead_one_finished(tmp_path, monkeypatch, inside):
    monkeypatch.setattr(_files, "_PATIENCE", 0.2)
    code = LIVE
    if inside:
        code = "import os.path\nos.path.ismount = lambda p: True\n" + code
    for dies in (False, True):
        target = tmp_path / f"saved{dies}"
        with replace_directory(target, "a") as folder:
            (folder / "a").write_text("old")
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(target)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "renamed\n"
        with pytest.raises(CheckpointError, match="being saved by another process"):
            settle(target)
        if dies:
            process.kill()
            process.wait()
            settle(target)
            assert (target / "a").read_text() == ("new" if inside else "old")
        else:
            process.stdin.write("\n" * 9)
            process.stdin.close()
            assert process.wait() == 0
            assert (target / "a").read_text() == "new"
        with replace_directory(target, "a") as folder:
            (folder / "b").write_text("last")
        assert tree(target).keys() == {"b", "smt_files.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"savedFalse", "savedTrue"}


def test_another_process_with_the_number_of_a_dead_one_is_told_apart(tmp_path):
    pid, host = os.getpid(), _files._host()
    assert _files._alive([str(pid), _files._started(pid), host])
    assert _files._alive([str(pid), "", ""])
    assert not _files._alive([str(pid), "1", host])
    assert _files._alive(["99999999", "1", "another-host"]), "nobody here can tell"
    (tmp_path / f".saved.new.{pid}.1.{host}.x").mkdir()
    (tmp_path / f".saved.new.{_files._owner()}.x").mkdir()
    with replace_directory(tmp_path / "saved", "a"):
        pass
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"saved", f".saved.new.{_files._owner()}.x"}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a directory, expected a file"):
        mlp_plan().save(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="null' is a file, expected a directory"):
        mlp_plan().save("/dev/null/plan.json")
    with pytest.raises(RuntimeError, match="mine"), replace_file(tmp_path / "new"):
        raise RuntimeError("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_a_folder_of_mine_in_a_parent_that_is_not(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):  # a worker of pytest-xdist has one more
        if folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, 65534, 65534)
    model = patched()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            smt_ext.save_blocks(model, mine, readme="card")
            smt_ext.save_blocks(model, mine)
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    smt_ext.load_blocks(mlp(), mine)
    assert sorted(p.name for p in mine.iterdir()) == [
        "blocks.safetensors", "smt_blocks.json", "smt_files.json",
    ]  # fmt: skip
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine"]
