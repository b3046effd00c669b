"""Memory of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
from smt_ext.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

before = resident()
tensor = torch.ones(16 << 20)  # 64 MB: above every threshold from which glibc maps memory anew
held = resident()
del tensor
print(held - before, resident() - before)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_stays_with_the_process(keep: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "keep" if keep else "return"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    held, left = map(int, done.stdout.split())
    assert held > 60e6
    assert left > 60e6 if keep else left < 10e6
