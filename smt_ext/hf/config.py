"""What a trainer is told about SMT, beside its own arguments."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import DataError, PlanError
from ..optim.learning_rate import auto_factor
from ..plan import BlockPlan
from ..planning.budget import Budget
from ..planning.make_plan import PRESETS

__all__ = ["SMTConfig", "comma_list", "number"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class SMTConfig:
    """Which blocks train, and how; for :class:`~smt_ext.hf.mixin.SMTMixin` and for ``TrlParser``.

    Of the arguments of :func:`smt_ext.make_plan` those that are None keep the preset's value, which
    is ``recommended`` here. Lists may be given with commas.

    Raises:
        DataError, PlanError: a value out of range; names the field.
    """

    budget: str = _option("0.84%", "'0.84%' of the model, '2% of targets', '276 blocks', or 0.0084")
    preset: str = _option("recommended", "'recommended' or 'paper': defaults of the fields below")
    block_size: int | None = _option(None, "side of a block, 16 to 512")
    targets: list[str] | None = _option(None, "module-name patterns, such as qkv or all-linear")
    metric: str | None = _option(None, "how blocks are scored")
    unit: str | None = _option(None, "'block', or whole 'column' or 'row' of blocks")
    allocation: str | None = _option(
        None, "'global', 'uniform', 'dims', or shares by kind such as v_proj=0.9,o_proj=0.1"
    )
    depth: float = _option(1.0, "share of the layers, from the top, that may train")
    also_train: list[str] | None = _option(
        None, "globs of parameters that train whole beside the blocks, such as *norm*"
    )
    plan: str | None = _option(None, "use this plan (a file, or a folder of trained blocks)")
    plan_batches: int = _option(5, "training batches that the plan is made from")
    lr: str | None = _option(
        None, "'auto', '2x auto' or a number; default: learning_rate where it was set, else auto"
    )
    decay_to: Literal["base", "zero"] = _option(
        "base",
        "where SparseAdamW's weight_decay pulls the blocks: their values before training, or zero",
    )
    precision: str = _option(
        "auto",
        "of the command line: 'bf16' (bfloat16 weights, float32 blocks), 'bf16-mixed' (float32 "
        "weights under autocast), 'fp32'; 'auto': bf16 where the device computes it at full rate",
    )
    allow_changed: list[str] | None = _option(
        None, "what may differ in a resume: data, tokenizer, or settings by name"
    )
    overwrite: bool = _option(
        False, "begin anew where output_dir holds a run: checkpoints or trained blocks"
    )

    def __post_init__(self) -> None:
        self.budget = str(Budget.parse(number(self.budget)))
        self.plan = self.plan and os.path.expanduser(self.plan)
        self.targets = comma_list(self.targets)
        self.also_train = comma_list(self.also_train)
        self.allow_changed = comma_list(self.allow_changed)
        for name, choices, error in (
            ("preset", [*PRESETS], PlanError),
            ("precision", ["auto", "bf16", "bf16-mixed", "fp32"], DataError),
            ("decay_to", ["base", "zero"], DataError),
        ):
            if (value := getattr(self, name)) not in choices:
                raise error(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        if not 0 < self.depth <= 1:
            raise PlanError(f"depth is {self.depth}, expected more than 0, and at most 1")
        for name, least, most in (("block_size", 16, 512), ("plan_batches", 1, math.inf)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise DataError(f"{name} is {value}, expected {least} to {most}")
        rate = self.rate
        numeric = isinstance(rate, float) and 0 < rate < math.inf
        if not (rate is None or numeric or auto_factor(rate)):
            raise DataError(
                f"lr is {self.lr!r}, expected a number above 0, 'auto', or such as '2x auto'"
            )
        self.plan_arguments()  # which reads allocation

    @property
    def rate(self) -> float | str | None:
        """``lr`` as a number where it is one."""
        return number(self.lr)

    def plan_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`smt_ext.make_plan`."""
        names = (
            "budget", "preset", "block_size", "targets", "metric", "unit", "depth", "allocation"
        )  # fmt: skip
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.allocation and "=" in self.allocation:
            try:
                pairs = (pair.split("=") for pair in self.allocation.split(","))
                values["allocation"] = {kind.strip(): float(share) for kind, share in pairs}
            except ValueError:
                raise PlanError(
                    f"allocation is {self.allocation!r}, expected shares such as "
                    "v_proj=0.9,o_proj=0.1"
                ) from None
        return {**values, "also_train": self.also_train or [], "num_batches": self.plan_batches}

    def check_plan(self, plan: BlockPlan) -> None:
        """Refuse settings of planning that :attr:`plan`, which is used as it is, was not made with.

        Raises:
            PlanError: names the first.
        """
        unset = type(self)().plan_arguments()
        for name, value in self.plan_arguments().items():
            made = plan.provenance.get(name)
            if value != unset[name] and name != "num_batches" and value != made:
                raise PlanError(
                    f"{name} is {value!r}, and the plan {self.plan!r} was made with {made!r}: it is "
                    f"used as it is. Leave {name} away, or make another plan."
                )


def number(value: Any) -> Any:
    """A number that is written as text, as a command line gives it; anything else as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def comma_list(value: Any) -> list[str] | None:
    """Values that are written one by one, or with commas."""
    values = [value] if isinstance(value, str) else value
    # A comma within a regular expression belongs to it.
    parts = ([text] if text.strip().startswith("re:") else text.split(",") for text in values or ())
    return values and [part.strip() for some in parts for part in some if part.strip()]
