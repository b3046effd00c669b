"""How the user starts this program, and where it may write."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ..errors import DataError

__all__ = ["make_output", "program"]


def program() -> str:
    """``smt-ext``, or its path where the shell would not find it (a virtual environment's, say)."""
    near = os.path.relpath(sys.argv[0])
    absent = Path(near).name == "smt-ext" and not shutil.which("smt-ext")
    return near if absent else "smt-ext"


def make_output(folder: Path) -> None:
    """Make a folder to write into, before a model is loaded for nothing.

    Raises:
        DataError: it cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the output folder {str(folder)!r}: {error.strerror}"
        ) from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"the output folder {str(folder)!r} cannot be written to")
