"""How the user starts this program, and where it may write."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from ..errors import DataError

__all__ = ["COMMAND", "begun_by", "make_output", "program"]

COMMAND = "command.json"  # in the folder of a run: the arguments that began it, and where


def program() -> str:
    """``smt-ext``, or its path where the shell would not find it (a virtual environment's, say)."""
    started = sys.argv[0]
    if Path(started).name != "smt-ext" or shutil.which("smt-ext"):
        return "smt-ext"
    return os.path.relpath(started)


def begun_by(run: str | os.PathLike[str]) -> tuple[list[str], Path]:
    """The arguments that began a run, and the folder that their relative names are of.

    Raises:
        DataError: ``run`` is no folder of a run.
    """
    try:
        begun = json.loads(Path(run, COMMAND).read_text(encoding="utf-8"))
        return begun["arguments"], Path(run, begun["folder"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{os.fspath(run)!r} holds no run to resume: no {COMMAND} in it") from None


def make_output(folder: Path) -> None:
    """Make a folder to write into, before a model is loaded for nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the output folder {str(folder)!r}: {error.strerror}"
        ) from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"the output folder {str(folder)!r} cannot be written to")
