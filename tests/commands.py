"""The command line as tests call it, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from smt_ext.cli import entry as cli

__all__ = ["LIMITS", "assert_same", "evaluations", "run", "trained", "wait_for_lines"]

# Enough for the tiny checkpoint of tests/cli.
LIMITS = ["--max-length", "120", "--precision", "fp32"]


def run(*arguments: str) -> int:
    """The command line, in this process."""
    return cli.main(list(arguments))


def trained(root: Path) -> tuple[dict, list[dict]]:
    """Blocks, and the metrics without timings."""
    lines = (root / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for line in metrics:
        del line["seconds"]
    return load_file(root / "blocks" / "blocks.safetensors"), metrics


def evaluations(root: Path) -> list[dict]:
    """What the run was on its held-out rows, by step."""
    return [json.loads(line) for line in (root / "evaluations.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """Both runs trained to the same bits, by the same steps."""
    (blocks, metrics), (other_blocks, other_metrics) = trained(one), trained(other)
    assert metrics == other_metrics
    assert blocks.keys() == other_blocks.keys()
    assert all((blocks[name] == other_blocks[name]).all() for name in blocks)


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen) -> None:
    """Wait until a file that the process writes has so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.005)
    pytest.fail("the run did not get far enough in two minutes")
