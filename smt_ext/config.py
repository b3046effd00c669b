"""The settings of a training run: one dataclass, filled from a YAML file and from flags."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = ["CHOICES", "TrainConfig", "load_config", "make_config", "save_config"]

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("bf16", "bf16-mixed", "fp32"),
    "template": ("plain", "alpaca", "chat"),
    "too_long": ("error", "skip"),
    "score": ("none", "equation", "exact"),
    "allocation": ("global", "uniform"),
    "device": ("auto", "cpu", "cuda"),
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of ``smt-ext train``; a field is a key of the YAML file and a flag.

    Raises:
        DataError: a value out of range; names the setting.
    """

    model: str = _setting("", "checkpoint folder, hub name, .gguf file, or 'smollm2'")
    data: str = _setting("", "training rows, JSON lines")
    output: str = _setting("smt-run", "directory of the run")
    eval: str | None = _setting(None, "held-out rows, JSON lines")
    plan: str | None = _setting(None, "use this plan instead of making one")
    budget: str = _setting("0.84%", "'0.84%%' of the model, '2%% of targets' or '276 blocks'")
    block_size: int = _setting(256, "side of a block, 16 to 512")
    targets: tuple[str, ...] = _setting(("qkv",), "module-name patterns")
    metric: str = _setting("mean_abs", "how blocks are scored")
    allocation: str = _setting("global", "rank all blocks together, or the same share each")
    plan_batches: int = _setting(5, "batches that the plan is made from")
    precision: str = _setting(
        "bf16", "bf16 weights with float32 master blocks, float32 under bf16 autocast, or float32"
    )
    lr: float = _setting(1e-3, "peak learning rate")
    epochs: float = _setting(1.0, "passes over the data; --steps overrules it")
    steps: int | None = _setting(None, "optimizer steps")
    batch_size: int = _setting(8, "rows (packed: sequences) of a micro-batch")
    accumulate: int = _setting(1, "micro-batches of an optimizer step")
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises")
    beta1: float = _setting(0.9, "AdamW's decay of the first moment")
    beta2: float = _setting(0.99, "AdamW's decay of the second moment")
    weight_decay: float = _setting(0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float | None = _setting(1.0, "clip the norm of the block gradients")
    template: str = _setting("plain", "how instruction rows become text")
    max_length: int = _setting(512, "most tokens of a row")
    too_long: str = _setting("error", "what to do with longer rows")
    packing: bool = _setting(False, "several rows share a sequence; none attends to another")
    gradient_checkpointing: bool = _setting(False, "recompute activations in backward")
    score: str = _setting("none", "accuracy on the held-out rows by generated answers")
    max_new_tokens: int = _setting(32, "most tokens of a generated answer")
    eval_batch_size: int = _setting(32, "rows of an evaluation batch")
    eval_every: int = _setting(
        0, "steps between evaluations while training; 0: only before and after"
    )
    save_every: int = _setting(50, "steps between saved training states")
    seed: int = _setting(0, "of the order of the rows and of all randomness")
    device: str = _setting("auto", "where to train")
    threads: int | None = _setting(None, "CPU threads; default: torch's choice")
    keep_memory: bool = _setting(
        True, "on the CPU, reuse freed memory at once: faster steps, some more memory"
    )

    def __post_init__(self) -> None:
        for name, expected in _TYPES.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), expected))
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise DataError(f"the setting {name!r} is missing: pass --{name} or set it in YAML")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"the setting {name!r} is {value}, expected at least 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError(f"the setting {name!r} is {value}, expected more than 0")
        if self.eval_every < 0:
            raise DataError(f"the setting 'eval_every' is {self.eval_every}, expected 0 or more")
        if not 0 <= self.warmup <= 1:
            raise DataError(f"the setting 'warmup' is {self.warmup}, expected 0 to 1")


_AT_LEAST_ONE = (
    "block_size", "plan_batches", "steps", "batch_size", "accumulate", "max_length",
    "max_new_tokens", "eval_batch_size", "save_every", "threads",
)  # fmt: skip
_POSITIVE = ("lr", "epochs", "max_grad_norm")
_TYPES: dict[str, Any] = {}


def make_config(values: dict[str, Any]) -> TrainConfig:
    """A config from settings by name.

    Raises:
        DataError: an unknown name (says which is close), or a bad value.
    """
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f". Known: {', '.join(known)}"
            raise DataError(f"unknown setting {name!r}{hint}")
    return TrainConfig(**values)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        DataError: no such file, or no mapping in it.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot read the settings in {os.fspath(path)!r}: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{os.fspath(path)!r} holds no settings, expected 'name: value' lines")
    return values


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write all settings as YAML; :func:`load_config` reads them back."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _checked(name: str, value: Any, expected: Any) -> Any:
    """``value`` as the field's type; YAML gives 1e-3 as text and whole numbers for floats."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    wrong = DataError(
        f"the setting {name!r} is {value!r}, expected {getattr(kind, '__name__', 'a list of text')}"
    )
    if kind == tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
            raise wrong
        return tuple(values)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    if name in CHOICES and value not in CHOICES[name]:
        raise DataError(
            f"the setting {name!r} is {value!r}, expected {', '.join(map(repr, CHOICES[name]))}"
        )
    return value


_TYPES.update(typing.get_type_hints(TrainConfig))
