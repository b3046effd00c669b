"""The exceptions that smt_ext raises for bad input.

Each derives from the built-in that a caller would catch without knowing smt_ext, and each message
names the module or argument, what was expected, what came, and the way out.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError", "DataError", "Interrupted", "PatchError", "PlanError", "first_line"
]  # fmt: skip


class PlanError(ValueError):
    """A block plan that is malformed or does not fit the model it is applied to."""


class PatchError(RuntimeError):
    """A model that cannot be patched, unpatched or trained in its present state."""


class CheckpointError(RuntimeError):
    """A saved artefact that is damaged, incomplete or made for another model."""


class DataError(ValueError):
    """A training or evaluation file with a row that cannot be used; names file and line."""


class Interrupted(Exception):
    """The user stopped a run; its state is saved, and the message says how to go on."""


def first_line(error: Exception) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    return [*str(error).strip().splitlines(), type(error).__name__][0]
