"""How the user starts this program, and where it may write."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from ..errors import DataError

__all__ = ["COMMAND", "begun_by", "make_output", "program", "template_of"]

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


def template_of(blocks: str | os.PathLike[str]) -> str:
    """The ``--template`` of the run whose blocks or checkpoint these are; ``plain`` without one.

    Raises:
        DataError: the run's settings cannot be read.
    """
    run = next((at for at in (Path(blocks), Path(blocks).parent) if (at / COMMAND).is_file()), None)
    if run is None:
        return "plain"
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--template")
    parser.add_argument("--config")
    try:
        arguments, folder = begun_by(run)
        found = parser.parse_known_args(arguments)[0]
        if found.template is None and found.config is not None:
            settings = yaml.safe_load((folder / found.config).read_text(encoding="utf-8"))
            found.template = settings.get("template")
    except (DataError, OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"cannot tell by which template {os.fspath(run)!r} was trained: {error}. Pass --template."
        ) from None
    return found.template or "plain"


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
