"""The command line, ``smt-ext``."""

from .entry import main

__all__ = ["main"]
