"""Directories that appear whole or not at all, that replace only our own, and checksums.

A save writes beside its target, syncs, and swaps by two renames. Where the target cannot be renamed
(a mount point, a parent that is not ours to write) it writes inside and moves file by file, which the
next reader or writer finishes if a crash cuts it short. What is under way carries its owner in its
name (process, the process's start, host), so that nobody touches what a live process is doing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError

__all__ = [
    "ATTEMPTS",
    "FILES",
    "check_list",
    "directory_inside",
    "identity",
    "is_being_saved",
    "printable",
    "remove_listed",
    "replace_directory",
    "replace_file",
    "resolved",
    "settle",
    "sha256_of_file",
    "system_error",
    "write_text",
]

# Lists what a save has written, with checksums: by it the next save knows what it may replace.
FILES = "smt_files.json"
_FILES_FORMAT, _FILES_VERSION = "smt_ext.files", 1
# What folders held before there was such a list: kind and file.
_FIRST_VERSION = {
    "smt_blocks.json": ("trained blocks", "blocks.safetensors"),
    "training_state.json": ("a training state", "training_state.safetensors"),
    "delta.json": ("a delta", "delta.safetensors"),
}
_MOVES = "smt_moves.json"
_INSIDE = ".smt"  # name of the target in what is under way inside of it
ATTEMPTS = 100  # other processes may save to the same place
_PATIENCE = 2.0  # seconds that a reader waits for a live save's two renames
_NOT_BESIDE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV)


@contextmanager
def replace_directory(
    directory: str | os.PathLike[str], kind: str, *, overwrite: bool = False, mark: str = "."
) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``directory`` once the block succeeds.

    At any moment ``directory`` is the old one or the new one, complete. A link is followed. The next
    call clears what a killed one has left behind.

    Args:
        kind: what is saved, in words. It replaces its own kind: a merged model takes no checkpoint's
            place, nor that of the blocks that it was made from.
        overwrite: also replace a directory that holds another kind, or what no save of ours has
            written.
        mark: what its name begins with until then, ``.`` or ``_``.

    Raises:
        CheckpointError: the disk is full or not writable, or the directory holds other things (names
            the first); ``directory`` is as it was.
    """
    target = resolved(directory)
    temporary = None
    try:
        if _is_no_folder(existing := _existing(target)):
            raise CheckpointError(f"{str(existing)!r} is a file, expected a directory to save into")
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target)
        _clear_stale(target)
        if not overwrite:
            _check_ours(target, kind)
        temporary = _room_for(target, mark)
        yield temporary
        _write_list(temporary, kind)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _set_mode(path, 0o666)  # safetensors lets nobody else read what it writes
            _sync(path)
        _sync(temporary)
        if temporary.parent == target:
            _move_in(temporary, target)
        else:
            _swap(temporary, target)
    except Exception as error:
        if (reported := system_error(error)) is None:
            raise
        raise CheckpointError(_explain(target, reported)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def directory_inside(folder: Path) -> Iterator[Path]:
    """Yield an empty directory in ``folder``, for as long; what a killed process has left goes first."""
    _clear_stale(folder)
    made = Path(tempfile.mkdtemp(dir=folder, prefix=f"_{_INSIDE}.new.{_owner()}."))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, that takes the place of ``path`` once the block succeeds."""
    target = resolved(path)
    if target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a directory, expected a file to write")
    if _is_no_folder(existing := _existing(target.parent)):
        raise CheckpointError(f"{str(existing)!r} is a file, expected a directory to save into")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.new.{_owner()}.")
        os.close(handle)
        temporary = Path(name)
        _set_mode(temporary, 0o666)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except Exception as error:
        if (reported := system_error(error)) is None:
            raise
        raise CheckpointError(_explain(target, reported)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where a path leads, links followed.

    Raises:
        CheckpointError: no path.
    """
    try:
        found = Path(os.path.realpath(path))
        if found.is_symlink():
            raise ValueError("its links lead in a circle")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is no usable path: {error}") from None
    return found


def printable(value: object) -> str:
    """Text of a file's author for a terminal: no control characters, not without end."""
    text = value if isinstance(value, str) else json.dumps(value)
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])
    return shown + ("..." if len(text) > 2000 else "")


def settle(target: Path) -> None:
    """Finish or undo what a save that was cut off has left of ``target``; wait for one that lives.

    Raises:
        CheckpointError: a live save does not end, or this process may not write there.
    """
    deadline = time.monotonic() + _PATIENCE
    while (left := _unsettled(target)) is not None:
        path, owner = left
        try:
            if not _alive(owner):
                _settle_one(path, target)
                continue
        except FileNotFoundError:
            continue  # another reader was faster
        except OSError as error:
            raise CheckpointError(
                f"a save to {str(target)!r} was cut off, and {path.name!r} cannot be put in its place: "
                f"{os.strerror(error.errno or 0)}. Read it once as a user who may write there."
            ) from error
        if time.monotonic() > deadline:
            raise CheckpointError(f"{str(target)!r} is being saved by another process; try again")
        time.sleep(0.02)


def is_being_saved(target: Path) -> bool:
    """Whether a save of the target is under way, or was cut off."""
    return next(_under_way(target.parent, target.name), None) is not None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    path.write_text(text, encoding="utf-8")


def identity(*paths: Path) -> list[tuple[int, int] | None]:
    """Changes when another save takes the place of what is there; None for what is not."""
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_list(directory: Path) -> None:
    """Compare every file that a save has written with its checksum.

    Raises:
        CheckpointError: one is missing or damaged; names it.
    """
    listed = _json_object(directory / FILES).get("sha256")
    for name, digest in listed.items() if isinstance(listed, dict) else [(FILES, "")]:
        file = directory / name
        if not file.is_file() or sha256_of_file(file) != digest:
            what = "damaged" if file.is_file() else "missing"
            raise CheckpointError(
                f"{str(file)!r} is {what}. Restore it, or use another checkpoint."
            )


# Ours or not.


def _write_list(directory: Path, kind: str) -> None:
    files = {
        path.relative_to(directory).as_posix(): sha256_of_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    info = {"format": _FILES_FORMAT, "version": _FILES_VERSION, "kind": kind,
            "sha256": files}  # fmt: skip
    write_text(directory / FILES, json.dumps(info, indent=1) + "\n")


def _check_ours(target: Path, kind: str) -> None:
    """Raise CheckpointError if the directory holds anything but what a save of this kind has written."""
    for attempt in range(ATTEMPTS):
        before = identity(target)
        try:
            _check_listed(target, kind)
            return
        except (CheckpointError, FileNotFoundError):
            # Another save may have taken its place between the list and the look.
            if identity(target) == before or attempt == ATTEMPTS - 1:
                raise


def _check_listed(target: Path, kind: str) -> None:
    if not target.is_dir():
        return
    held, ours = _listed(target)
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if name.startswith(f".{_INSIDE}."):
            continue  # another process is saving
        if path.is_dir() and not path.is_symlink():
            if any(known.startswith(name + "/") for known in ours):
                continue
        # People edit model cards; the other files nobody writes by hand.
        elif name in ours and not (
            path.is_symlink()
            or (name.endswith(".md") and ours[name] not in (None, sha256_of_file(path)))
        ):
            continue
        raise CheckpointError(
            f"{str(target)!r} holds {name!r}, which smt_ext has not written as it is. {_WAYS_OUT}"
        )
    if held not in (None, kind):
        raise CheckpointError(
            f"{str(target)!r} holds {printable(held)}, and {kind} would take its place. {_WAYS_OUT}"
        )


_WAYS_OUT = (
    "Nothing was changed. Choose another directory, move it away, or pass overwrite=True to replace the "
    "whole directory."
)


def remove_listed(directory: Path) -> None:
    """Remove what a save has written there, and the folders that this leaves empty."""
    real = resolved(directory)
    for name in _listed(real)[1]:
        (real / name).unlink(missing_ok=True)
    for folder in sorted({real, *filter(Path.is_dir, real.rglob("*"))}, reverse=True):
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    if directory.is_symlink() and not real.exists():
        directory.unlink()


def _listed(target: Path) -> tuple[str | None, dict[str, str | None]]:
    """What a save has written there: its kind, if known, and names with their checksums."""
    info = _json_object(target / FILES)
    if info.get("format") == _FILES_FORMAT and isinstance(info.get("sha256"), dict):
        return info.get("kind"), {**info["sha256"], FILES: None}
    for name, (kind, other) in _FIRST_VERSION.items():
        if str(_json_object(target / name).get("format")).startswith("smt_ext."):
            return kind, dict.fromkeys({name, "README.md", other})
    return None, {}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


# Under way: .NAME.new.OWNER.RANDOM (or _NAME.) and .NAME.old.OWNER.RANDOM beside the target, or, inside
# of it, ..smt.new.OWNER.RANDOM and, from the moment that it counts, ..smt.moves.OWNER.RANDOM.
# An owner is a process, when it began if known, and a host: "NAME.old.2" is a name as well.
_OWNED = re.compile(r"(new|old|moves)\.(\d+(?:\.\d*(?:\..*)?)?)")


def _owner() -> str:
    return f"{os.getpid()}.{_started(os.getpid())}.{_host()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def _started(pid: int) -> str:
    """When a process began, so that another one with its number is told apart; "" if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(owner: list[str]) -> bool:
    pid, started, host, *_ = [*owner, "", ""]
    if host not in ("", _host()):
        return True  # nobody here can tell
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return started in ("", _started(int(pid)))


def _under_way(folder: Path, name: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Path, kind and owner of all that saves of ``name`` have in a folder."""
    prefixes = (f".{name}.", f"_{name}.")
    try:
        found = sorted(entry for entry in os.listdir(folder) if entry.startswith(prefixes))
    except OSError:
        return
    for entry in found:
        if owned := _OWNED.fullmatch(entry[len(name) + 2 :]):
            yield folder / entry, owned[1], owned[2].split(".")


def _unsettled(target: Path) -> tuple[Path, list[str]] | None:
    """What stands for the target at this moment, with its owner; None if it is itself."""
    if not os.path.lexists(target):
        for path, kind, owner in _under_way(target.parent, target.name):
            if kind == "old":
                return path, owner
    for path, kind, owner in _under_way(target, _INSIDE):
        if kind == "moves":
            return path, owner
    return None


def _settle_one(path: Path, target: Path) -> None:
    if path.parent == target:
        _finish_moves(path, target)
    else:
        os.rename(path, target)
        _sync(target.parent)


def _clear_stale(target: Path) -> None:
    """Remove what killed processes left; others may be saving right now."""
    for folder, name in ((target.parent, target.name), (target, _INSIDE)):
        for path, kind, owner in _under_way(folder, name):
            if kind in ("new", "old") and not _alive(owner):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _room_for(target: Path, mark: str) -> Path:
    """An empty directory beside the target, or inside where it cannot be renamed."""
    suffix = f"new.{_owner()}."
    try:
        if os.path.ismount(target) or _is_where_we_are(target):
            raise OSError(errno.EBUSY, "mount point, or this process's directory")
        made = tempfile.mkdtemp(dir=target.parent, prefix=f"{mark}{target.name}.{suffix}")
    except OSError as error:
        if error.errno not in _NOT_BESIDE or not target.is_dir():
            raise
        made = tempfile.mkdtemp(dir=target, prefix=f".{_INSIDE}.{suffix}")
    _set_mode(Path(made), 0o777)
    return Path(made)


def _is_where_we_are(folder: Path) -> bool:
    """Whether relative paths of this process would lead nowhere, were the folder replaced."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _swap(new: Path, target: Path) -> None:
    # rename() cannot replace a directory that is not empty. Between the two renames only the
    # ".old." one is there; settle() brings it back if this process is gone.
    # Of this call alone: other threads may save there, too.
    old = target.with_name(f".{target.name}.old.{_owner()}.{secrets.token_hex(4)}")
    try:
        for attempt in range(ATTEMPTS):
            if os.path.lexists(target):
                if old.exists():
                    shutil.rmtree(old)
                with suppress(FileNotFoundError):  # the other one was faster
                    os.rename(target, old)
            try:
                os.rename(new, target)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == ATTEMPTS - 1:
                    raise
        _sync(target.parent)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_in(new: Path, target: Path) -> None:
    """Put files in place one by one; the first rename makes it count."""
    names = [path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()]
    held = [path.relative_to(target).as_posix() for path in target.rglob("*")
            if path.is_file()]  # fmt: skip
    held = [name for name in held if not name.startswith(f".{_INSIDE}.")]
    obsolete = sorted(set(held) - set(names))
    write_text(new / _MOVES, json.dumps({"obsolete": obsolete}))
    _sync(new / _MOVES)
    _sync(new)
    moves = target / f".{_INSIDE}.moves.{_owner()}.{secrets.token_hex(4)}"
    os.rename(new, moves)
    _sync(target)
    _finish_moves(moves, target)


def _finish_moves(moves: Path, target: Path) -> None:
    obsolete = _json_object(moves / _MOVES).get("obsolete", [])
    for path in sorted(moves.rglob("*")):
        name = path.relative_to(moves)
        if path.is_dir():
            (target / name).mkdir(exist_ok=True)
        elif name.as_posix() != _MOVES:
            os.replace(path, target / name)
    for name in obsolete:
        if (target / name).resolve().is_relative_to(target):
            (target / name).unlink(missing_ok=True)
    _sync(target)
    shutil.rmtree(moves)
    _sync(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot: those of containers and networks with folders, say.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


# Read once: there is no way to ask without setting it, which other threads would notice.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def _set_mode(path: Path, mode: int) -> None:
    """As the user's files are made; left alone by file systems without modes."""
    with suppress(PermissionError):
        path.chmod(mode & ~_UMASK)


def system_error(error: Exception) -> OSError | None:
    """The system's error in what safetensors, tokenizers and torch raise where a disk is full."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return OSError("torch could not write a file whole; the disk may be full")
    number = re.search(r"os error (\d+)", str(error))
    if type(error) not in ((SafetensorError, Exception) if number else (SafetensorError,)):
        return None
    return OSError(int(number[1]) if number else None, str(error))


def _explain(target: Path, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot save to {str(target)!r}: {reason}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_existing(target)).free
        message += f" {free:,} bytes are free there; make room or choose another directory."
    return message + " What was saved there before is untouched."


def _is_no_folder(path: Path) -> bool:
    """Asked once: another save may move it away at any moment, and then there is nothing."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
