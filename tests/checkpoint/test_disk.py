"""Saving when the disk is full, read-only, or the process is killed: nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import smt_ext
from models import llama_plan, save_checkpoint, tiny_llama
from smt_ext import CheckpointError
from smt_ext._files import replace_directory


def patched():
    model = tiny_llama()
    return smt_ext.patch(model, llama_plan(model))


def save_blocks(model, folder):
    smt_ext.save_blocks(model, folder)


def save_state(model, folder):
    smt_ext.save_training_state(folder, model, smt_ext.SparseAdamW(model, lr=1e-3))


def export(model, folder):
    smt_ext.export(model, folder)


@contextlib.contextmanager
def small_files():
    """Files of this process may not grow beyond 4 KB, as on a full disk.

    Not a fixture: pytest reports a test before its fixtures end, and that report may go to a long file.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("save", [save_blocks, save_state, export])
def test_no_room(tmp_path, save):
    model = patched()
    save(model, tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    message = r"cannot save to .*saved'.*bytes are free"
    with small_files(), pytest.raises(CheckpointError, match=message):
        save(model, tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_no_room_for_a_tokenizer(tmp_path):
    """Which raises a plain Exception."""
    tokenizer = AutoTokenizer.from_pretrained(save_checkpoint(tmp_path / "base"))
    tokenizer.add_tokens([f"[{i}]" for i in range(200)])  # above 4 KB
    message = r"cannot save to .*saved'.*bytes are free"
    with (
        small_files(),
        pytest.raises(CheckpointError, match=message),
        replace_directory(tmp_path / "saved", "a model") as folder,
    ):
        tokenizer.save_pretrained(folder)
    with pytest.raises(Exception, match="mine"), replace_directory(tmp_path / "saved", "a model"):
        raise Exception("mine")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(CheckpointError, match="saved' is a file, expected a directory"):
        smt_ext.save_blocks(patched(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="saved' is a file, expected a directory"):
        smt_ext.save_blocks(patched(), tmp_path / "saved" / "below")
    assert (tmp_path / "saved").read_text() == "mine"


SAVER = """
import sys
from pathlib import Path
from smt_ext._files import replace_directory
number = 0
while True:
    with replace_directory(sys.argv[1], "a") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(number) * 2000)
    number += 1
    if number == 3:
        print("going", flush=True)
"""


def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    target = tmp_path / "saved"
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(target)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        with contextlib.suppress(subprocess.TimeoutExpired):  # as meant: it saves for ever
            process.wait(0.002 * attempt)
        process.kill()
        process.wait()
        smt_ext._files.settle(target)
        contents = {p.name: p.read_text() for p in target.iterdir()}
        assert set(contents) == {"a", "b", "smt_files.json"}
        assert contents["a"] == contents["b"]
        assert len(contents["a"]) >= 2000
    with replace_directory(target, "a") as folder:
        (folder / "a").write_text("last")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"], "what the killed left is cleared"


def test_a_crash_between_the_two_renames_is_recovered_by_loading(tmp_path):
    model = patched()
    smt_ext.save_blocks(model, tmp_path / "blocks")
    os.rename(tmp_path / "blocks", tmp_path / ".blocks.old.99999999.")
    smt_ext.load_blocks(tiny_llama(), tmp_path / "blocks")
    assert (tmp_path / "blocks" / "smt_blocks.json").exists()


def test_a_failed_load_leaves_no_trace(tmp_path):
    smt_ext.save_blocks(patched(), tmp_path / "blocks")
    Path(tmp_path / "blocks" / "blocks.safetensors").write_bytes(b"")
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="damaged"):
        smt_ext.load_blocks(model, tmp_path / "blocks")
    assert not smt_ext.smt_modules(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), tiny_llama().state_dict().values(), strict=True))  # fmt: skip


def test_a_file_system_that_syncs_no_folders_and_has_no_modes(tmp_path, monkeypatch):
    synced = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced(handle)

    def chmod(path, mode, **more):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "chmod", chmod)
    smt_ext.save_blocks(patched(), tmp_path / "saved")
    smt_ext.load_blocks(tiny_llama(), tmp_path / "saved")


def test_files_are_as_private_as_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(smt_ext._files, "_UMASK", 0o077)
    smt_ext.save_blocks(patched(), tmp_path / "saved")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").iterdir()}
    assert modes == {0o600}


def test_torchs_own_word_of_a_full_disk_is_a_message(tmp_path):
    message = r"cannot save to .*saved': torch could not write a file whole"
    with pytest.raises(CheckpointError, match=message), replace_directory(tmp_path / "saved", "a"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
