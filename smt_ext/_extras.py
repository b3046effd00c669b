"""Optional packages: which extra brings them, and one message for those that are absent."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import DataError

__all__ = ["require"]

# Import name -> extra of pyproject.toml.
_EXTRAS = {
    **dict.fromkeys(
        (
            "accelerate", "datasets", "gguf", "matplotlib", "peft", "psutil", "rich", "transformers",
            "trl", "yaml",
        ),
        "train",
    ),
    "lm_eval": "eval",
    "bitsandbytes": "quantized",
    "torchao": "quantized",
}  # fmt: skip


def require(purpose: str, *modules: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        purpose: what needs them, as the beginning of a sentence: "smt-ext report".
        modules: import names, of those that an extra of smt_ext brings.

    Raises:
        DataError: some are absent; names them and the command that installs them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({_EXTRAS[module] for module in missing}))
        raise DataError(f"{purpose} needs {' and '.join(missing)}: pip install 'smt_ext[{extras}]'")
