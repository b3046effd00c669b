"""What importing the package and starting the command line must not load."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(code: str) -> set[str]:
    """The modules of a new interpreter after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('modules', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


def test_the_public_names_load_torch_and_nothing_large() -> None:
    code = "import smt_ext\nfor n, m in smt_ext._HOME.items(): m.startswith('hf') or getattr(smt_ext, n)"
    modules = loaded_by(code)
    assert "torch" in modules
    large = {"torch.distributed.fsdp", "torch.distributed.tensor", "sympy", "transformers", "peft"}
    assert not large & modules


def test_import_alone_loads_no_torch() -> None:
    assert "torch" not in loaded_by("import smt_ext; smt_ext.__version__; dir(smt_ext)")


def test_block_sets_is_a_module() -> None:
    assert "smt_ext.block_sets" in loaded_by(
        "import smt_ext.block_sets as one\nimport smt_ext\nassert one is smt_ext.block_sets"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["estimate", "--help"],
        ["no-such-command"],
        ["estimate", "--no-such-option"],
        ["estimate", "--model", "m", "--batch", "many"],
    ],
    ids=" ".join,
)
def test_help_and_argument_errors_load_no_torch(arguments: list[str]) -> None:
    modules = loaded_by(
        "from smt_ext.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert (end.code == 0) == ('--help' in sys.argv[1:] + "
        f"{arguments!r})"
    )
    assert "smt_ext.cli.entry" in modules
    assert not {"torch", "transformers", "numpy"} & modules
