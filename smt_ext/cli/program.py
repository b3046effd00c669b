"""How the user starts this program, and how its flags may be spelt."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["program", "underscored"]


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
