"""A command whose packages are absent says which, and how to install them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from smt_ext import DataError, _extras
from smt_ext._extras import require

ROOT = Path(__file__).parents[2]


def test_absent_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require("smt-ext train", "transformers")
    absent = {"trl", "psutil", "lm_eval"}
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(DataError) as failed:
        require("smt-ext train", "psutil", "transformers", "trl")
    assert str(failed.value) == "smt-ext train needs psutil and trl: pip install 'smt_ext[train]'"
    with pytest.raises(DataError, match=re.escape("pip install 'smt_ext[eval,train]'")):
        require("smt-ext eval", "trl", "lm_eval")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is Python 3.11's")
def test_every_package_is_in_its_extra() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module, extra in _extras._EXTRAS.items():
        distribution = {"yaml": "pyyaml", "lm_eval": "lm-eval"}.get(module, module)
        names = [re.split(r"[>=\[]", entry)[0] for entry in project["optional-dependencies"][extra]]
        assert distribution in names, f"{module} in [{extra}]"
