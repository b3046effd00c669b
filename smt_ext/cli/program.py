"""How the user starts this program, how its flags may be spelt, and where it may write."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ..errors import DataError

__all__ = ["make_output", "program", "underscored"]


def program() -> str:
    """``smt-ext``, or its path where the shell would not find it (a virtual environment's, say)."""
    started = Path(sys.argv[0])
    if started.name != "smt-ext" or shutil.which("smt-ext"):
        return "smt-ext"
    near = os.path.relpath(started)
    return str(started) if near.startswith(os.pardir) else near


def underscored(argument: str) -> str:
    """``--max-new-tokens=8`` as YAML and TRL name it: ``--max_new_tokens=8``; values stay."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


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
