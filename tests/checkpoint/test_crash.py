"""The crash harness as a test, and that it sees a writer that is not safe."""

from __future__ import annotations

import crash
import pytest

PLACES = [(name, mounted) for name in crash.WRITERS for mounted in (False, True)]


@pytest.mark.parametrize(
    ("name", "mounted"), [p for p in PLACES if not (p[1] and p[0] in ("plan", "file"))]
)
def test_every_crash_recovers_and_leaves_nothing_behind(name, mounted):
    tried, faults = crash.run(name, mounted)
    assert tried > 6
    assert not faults, "\n".join(faults)


def test_the_harness_sees_a_writer_that_writes_in_place(monkeypatch):
    def careless(path, value):
        path.write_text(str(value))

    monkeypatch.setitem(crash.WRITERS, "careless", (careless, lambda path: float(path.read_text())))
    _, faults = crash.run("careless", False)
    assert any("ValueError" in fault for fault in faults)
