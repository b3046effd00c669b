"""The command line as tests call it."""

from __future__ import annotations

from smt_ext import cli

__all__ = ["LIMITS", "run"]

# Enough for the tiny checkpoint of tests/cli.
LIMITS = ["--max-length", "120", "--precision", "fp32"]


def run(*arguments: str) -> int:
    """The command line, in this process."""
    return cli.main(list(arguments))
