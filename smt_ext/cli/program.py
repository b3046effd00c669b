"""How the user starts this program, and where it may write."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ..errors import DataError

__all__ = ["COMMAND", "make_output", "program"]

COMMAND = "command.json"  # in the folder of a run: the arguments that began it


def program() -> str:
    """``smt-ext``, or its path where the shell would not find it (a virtual environment's, say)."""
    started = sys.argv[0]
    if Path(started).name != "smt-ext" or shutil.which("smt-ext"):
        return "smt-ext"
    return os.path.relpath(started)


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
