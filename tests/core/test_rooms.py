"""The package's folders stand on each other in one order, from the ground up."""

import ast
from pathlib import Path

import smt_ext

ROOT = Path(smt_ext.__file__).parent
FLOORS = ("", "distributed", "nn", "planning", "optim", "checkpoint", "hf", "estimation", "report",
          "cli")  # fmt: skip


def test_no_folder_imports_one_above_it() -> None:
    upward = []
    for path in ROOT.rglob("*.py"):
        folder = path.parent.relative_to(ROOT).as_posix().removeprefix(".")
        if not folder and path.stem in ("__init__", "block_sets"):  # the public names
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == (2 if folder else 1):
                above = (node.module or "").partition(".")[0]
                if above in FLOORS and FLOORS.index(above) > FLOORS.index(folder):
                    upward.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {above}")
    assert not upward


def test_every_folder_is_a_floor() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix().removeprefix(".") for path in ROOT.rglob("*.py")
    }
    assert found == set(FLOORS)
