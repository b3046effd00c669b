"""Several processes or threads save to one place while others read it: whole at every moment."""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback

import pytest
from crash import trained

import smt_ext
from models import mlp
from smt_ext import CheckpointError, _files
from smt_ext._files import replace_directory, replace_file
from smt_ext.checkpoint.blocks import read_blocks_info

SECONDS = 4


def patiently(call):
    """On a busy machine a save may rest between its two renames for longer than others wait."""
    while True:
        try:
            return call()
        except CheckpointError as error:
            if "by another process; try again" not in str(error):
                raise


def value_of(folder):
    return float(patiently(lambda: smt_ext.load_blocks(mlp(), folder)).up_proj.weight[32, 0])


def children(count, work):
    """Whether forked processes end well; each calls ``work(number)`` again and again."""
    end, pids = time.monotonic() + SECONDS, []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                while time.monotonic() < end:
                    work(number)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("mounted", [False, True])
def test_blocks(tmp_path, monkeypatch, mounted):
    target = tmp_path / "saved"
    models = [trained(1.0), trained(2.0)]
    if mounted:  # files are then moved one by one: two writers would mix, so there is one
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
        target.mkdir()
    smt_ext.save_blocks(models[0], target)

    def work(number):
        if number < (1 if mounted else 2):
            model = models[(number + int(1e3 * time.monotonic())) % 2]
            patiently(lambda: smt_ext.save_blocks(model, target))
        else:
            assert value_of(target) in (1.0, 2.0)

    assert children(3, work) == [0, 0, 0]
    assert value_of(target) in (1.0, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert not [p.name for p in target.iterdir() if p.name.startswith(".")]


def test_a_folder_that_is_replaced_while_it_is_looked_at(tmp_path, monkeypatch):
    """What is ours is read from a list; another save's files may be there by then."""
    target = tmp_path / "saved"
    smt_ext.save_blocks(trained(1.0), target)
    other = shutil.copytree(target, tmp_path / "other")
    listed, asked = _files._listed, []

    def replaced_meanwhile(folder):
        asked.append(folder)
        if len(asked) > 1:
            return listed(folder)
        target.rename(tmp_path / "old")
        found = listed(folder)
        other.rename(target)
        return found

    monkeypatch.setattr(_files, "_listed", replaced_meanwhile)
    smt_ext.save_blocks(trained(2.0), target)
    assert value_of(target) == 2.0
    (target / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="'mine'"):
        smt_ext.save_blocks(trained(1.0), target)


def test_files_and_plain_folders(tmp_path):
    def save_folder(text):
        with replace_directory(tmp_path / "folder", "a") as temporary:
            (temporary / "a").write_text(text)
            (temporary / "b").write_text(text)

    def work(number):
        text = str(number) * 5000
        with replace_file(tmp_path / "file") as temporary:
            temporary.write_text(text)
        patiently(lambda: save_folder(text))
        assert len(set((tmp_path / "file").read_text())) == 1

    assert children(3, work) == [0, 0, 0]
    folder = tmp_path / "folder"
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_threads_of_one_process(tmp_path):
    target, failed = tmp_path / "saved", []
    smt_ext.save_blocks(trained(1.0), target)
    end = time.monotonic() + SECONDS

    def again_and_again(work):
        try:
            while time.monotonic() < end:
                patiently(work)
        except BaseException as error:
            failed.append(error)

    models = [trained(1.0), trained(2.0)]
    works = [lambda model=model: smt_ext.save_blocks(model, target) for model in models]
    works.append(lambda: read_blocks_info(target))
    threads = [threading.Thread(target=again_and_again, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert value_of(target) in (1.0, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_save_to_a_longer_name_is_another_ones(tmp_path):
    smt_ext.save_blocks(trained(1.0), tmp_path / "model.old.2")
    with replace_directory(tmp_path / "model.old.2", "trained blocks"):
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot read"):
            smt_ext.load_blocks(mlp(), tmp_path / "model")
        assert time.monotonic() - begun < _files._PATIENCE
