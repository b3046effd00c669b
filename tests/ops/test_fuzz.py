"""A short run of the kernels' fuzz, with a new seed each time; ``make fuzz`` runs it for longer."""

from __future__ import annotations

import subprocess

from build_cpp import build


def test_random_calls_are_clean_under_sanitizers():
    program = build("sanitized", "fuzz_kernels") / "tests" / "cpp" / "fuzz_kernels"
    done = subprocess.run([str(program), "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    seed, cases = done.stdout.splitlines()
    assert seed.startswith("seed ")
    assert int(cases.split()[0]) > 20
