"""A tiny checkpoint with its tokenizer."""

from __future__ import annotations

import pytest

from models import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama over single characters, with dropout."""
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"), attention_dropout=0.1))
