"""How the user starts this program."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["program"]


def program() -> str:
    """``smt-ext``, or its path where the shell would not find it (a virtual environment's, say)."""
    started = Path(sys.argv[0])
    if started.name != "smt-ext" or shutil.which("smt-ext"):
        return "smt-ext"
    near = os.path.relpath(started)
    return str(started) if near.startswith(os.pardir) else near
