"""Directories that appear whole or not at all, and checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

__all__ = ["replace_directory", "replace_file", "sha256_of_file", "write_text"]


@contextmanager
def replace_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``directory`` once the block succeeds.

    At any moment ``directory`` is the old one or the new one, complete: the new one is written and
    synced beside it, then swapped in. The next call clears what a killed one has left behind.

    Raises:
        CheckpointError: the disk is full or not writable; ``directory`` is as it was.
    """
    target = Path(directory).absolute()
    if not (existing := _existing(target)).is_dir():
        raise CheckpointError(f"{str(existing)!r} is a file, expected a directory to save into")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(target)
        _clear_stale(target)
        prefix = f".{target.name}.new.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        temporary.chmod(0o755)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors lets nobody else read what it writes
                _sync(path)
        _sync(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise CheckpointError(_explain(target, error)) from error
    except SafetensorError as error:
        raise CheckpointError(_explain(target, _system_error(error))) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, that takes the place of ``path`` once the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def recover_directory(target: Path) -> None:
    """Bring the old directory back where a crash fell between the two renames of a swap."""
    for old in sorted(target.parent.glob(f".{target.name}.old.*")):
        if not target.exists():
            os.rename(old, target)


def _clear_stale(target: Path) -> None:
    """Remove what killed processes left beside ``target``; others may be saving right now."""
    for path in target.parent.glob(f".{target.name}.*"):
        _, kind, pid, *_ = [*path.name[len(target.name) + 1 :].split("."), "", ""]
        if kind in ("new", "old") and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    path.write_text(text, encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _swap(new: Path, target: Path) -> None:
    # rename() cannot replace a directory that is not empty. Between the two renames only the
    # ".old." one is there; recover_directory brings it back, for the loader as well.
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old.{os.getpid()}.")
        os.rename(target, old)
    os.rename(new, target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _system_error(error: SafetensorError) -> OSError:
    """safetensors reports a full disk as an error of its own, with the system's reason as text."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else None, str(error))


def _explain(target: Path, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot save to {str(target)!r}: {reason}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_existing(target)).free
        message += f" {free:,} bytes are free there; make room or choose another directory."
    return message + " What was saved there before is untouched."


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
