"""Which blocks of which weights train: a frozen, validated value that lives in a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from ._files import replace_file
from .errors import PlanError
from .layouts import SUPPORTED, ExpertMatrix, Matrix, find_matrix, is_conv1d, matrices, shape_NK
from .quantization import why_unusable

__all__ = ["BlockPlan", "LayerPlan", "kind_of", "model_fingerprint"]

FORMAT = "smt_ext.block_plan"
VERSION = 1
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 512
_CHOICE = ("metric", "unit", "allocation", "depth", "seed")  # of the provenance, to print


@dataclass(frozen=True)
class LayerPlan:
    """The selected blocks of one weight.

    Attributes:
        shape: (N, K) of the weight, out_features and in_features.
        block_size: L, 16 to 512. Neither N nor K needs to be a multiple of it: blocks at the lower
            and right edge are smaller.
        blocks: (row, column) indices in the block grid, sorted and unique. Block (r, c) covers
            ``weight[r*L : min((r+1)*L, N), c*L : min((c+1)*L, K)]``.

    Raises:
        PlanError: a value out of range, blocks unsorted or repeated.
    """

    shape: tuple[int, int]
    block_size: int
    blocks: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _pair(self.shape, "shape"))
        object.__setattr__(self, "blocks", tuple(_pair(b, "block") for b in self.blocks))
        if min(self.shape) < 1:
            raise PlanError(f"shape is {self.shape}, expected two positive numbers")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool):
            raise PlanError(f"block_size is {self.block_size!r}, expected a whole number")
        if not MIN_BLOCK_SIZE <= self.block_size <= MAX_BLOCK_SIZE:
            raise PlanError(
                f"block_size is {self.block_size}, expected {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
            )
        rows, cols = self.grid
        for before, block in zip((None, *self.blocks), self.blocks, strict=False):
            if not (0 <= block[0] < rows and 0 <= block[1] < cols):
                raise PlanError(
                    f"block {block} is out of range: a weight of shape {self.shape} has a grid of "
                    f"{rows} x {cols} blocks of size {self.block_size}"
                )
            if before is not None and block <= before:
                fault = "is repeated" if block == before else f"comes after {before}"
                raise PlanError(f"block {block} {fault}: expected sorted, unique (row, column)")

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C), the number of block rows and columns of the weight."""
        n, k = self.shape
        return -(-n // self.block_size), -(-k // self.block_size)

    def extent(self, block: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a block; less than (L, L) at a ragged edge."""
        size = self.block_size
        height, width = (min(size, s - i * size) for s, i in zip(self.shape, block, strict=True))
        return height, width

    def area(self, block: tuple[int, int]) -> int:
        """Entries of the weight in a block; less than L x L at a ragged edge."""
        height, width = self.extent(block)
        return height * width

    @cached_property
    def num_parameters(self) -> int:
        """Entries of the weight that train."""
        return sum(map(self.area, self.blocks))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The selected blocks of a model, and where the selection came from (SMT paper, section 3.1).

    Attributes:
        layers: module name -> LayerPlan, sorted by name.
        provenance: how the plan was made (metric, samples, seed, budget, model type, fingerprint,
            package version); plain JSON values.
        input_groups: names of modules that were seen to read the same input tensor; their
            gathered input columns are stored once.
        also_train: parameters that train whole beside the blocks, such as gains of norms: name ->
            shape.

    Raises:
        PlanError: a layer that is no LayerPlan, a group with an unknown module, or a parameter that
            is the weight of a layer too.
    """

    layers: Mapping[str, LayerPlan]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    input_groups: tuple[tuple[str, ...], ...] = ()
    also_train: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if not isinstance(layer, LayerPlan):
                raise PlanError(f"layer {name!r} is a {type(layer).__name__}, expected a LayerPlan")
        layers = {name: self.layers[name] for name in sorted(self.layers)}
        object.__setattr__(self, "layers", MappingProxyType(layers))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        groups = tuple(tuple(sorted(group)) for group in self.input_groups)
        object.__setattr__(self, "input_groups", tuple(sorted(groups)))
        for name in (name for group in groups for name in group):
            if name not in layers:
                raise PlanError(f"input group names {name!r}, which is no layer of the plan")
        also = {name: _sizes(self.also_train[name], name) for name in sorted(self.also_train)}
        object.__setattr__(self, "also_train", MappingProxyType(also))
        for name in also:
            module, _, kind = name.rpartition(".")
            if name in layers or (module in layers and kind == "weight"):
                raise PlanError(f"{name!r} trains whole beside the blocks, and holds blocks too")

    # Mapping proxies cannot be pickled or copied; the constructor's arguments can.
    def __reduce__(self) -> tuple[Any, ...]:
        layers, provenance, also = dict(self.layers), dict(self.provenance), dict(self.also_train)
        return BlockPlan, (layers, provenance, self.input_groups, also)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockPlan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def num_blocks(self) -> int:
        """Selected blocks over all layers."""
        return sum(len(layer.blocks) for layer in self.layers.values())

    @property
    def num_parameters(self) -> int:
        """Entries of weights that train in blocks."""
        return sum(layer.num_parameters for layer in self.layers.values())

    @property
    def num_beside(self) -> int:
        """Entries of the parameters that train whole beside the blocks."""
        return sum(math.prod(shape) for shape in self.also_train.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what is selected, whatever the provenance."""
        selected: Any = self._layers_json()
        if self.also_train:
            selected = {"layers": selected, "also_train": dict(self.also_train)}
        return hashlib.sha256(_canonical(selected).encode()).hexdigest()

    def validate(self, model: nn.Module) -> None:
        """Check that every planned layer and parameter exists in the model with the planned shape.

        Raises:
            PlanError: names the first module that does not fit, and the way out.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, layer in self.layers.items():
            matrix = find_matrix(modules, name)
            if matrix is None:
                raise PlanError(
                    f"the plan has a layer {name!r}, but {type(model).__name__} has no such module"
                    f"{_closest(name, modules)}. The plan was made for another model"
                    f"{self._made_for()}: plan again with smt_ext.make_plan(model, ...)."
                )
            if isinstance(matrix, nn.Module) and (why := why_unusable(matrix)) is not None:
                raise PlanError(f"{name!r} {why}; or leave it out of the plan's targets.")
            if not _is_linear(matrix):
                raise PlanError(
                    f"{name!r} is a {type(matrix).__name__}, expected {SUPPORTED}. Leave it out of "
                    "the plan's targets."
                )
            shape = shape_NK(matrix)
            if shape != layer.shape:
                raise PlanError(
                    f"{name!r} has a weight of shape {shape}, but the plan was made for "
                    f"{layer.shape}{self._made_for()}: plan again with smt_ext.make_plan(model, ...)."
                )
            check_block_size(name, matrix, layer.block_size)
        parameters = dict(model.named_parameters()) if self.also_train else {}
        for name, sizes in self.also_train.items():
            found = parameters.get(name)
            if found is None or tuple(found.shape) != sizes or not found.is_floating_point():
                what = (
                    "none" if found is None else f"one of shape {tuple(found.shape)}, {found.dtype}"
                )
                raise PlanError(
                    f"the plan also trains the parameter {name!r} of shape {sizes}, and "
                    f"{type(model).__name__} has {what}{self._made_for()}: plan again with "
                    "smt_ext.make_plan(model, ...)."
                )

    def to_json(self) -> str:
        """The plan as JSON text: the same plan gives the same bytes."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "layers": self._layers_json(),
            "input_groups": self.input_groups,
            "provenance": dict(self.provenance),
        }
        if self.also_train:
            body["also_train"] = dict(self.also_train)
        return _canonical(body)

    @classmethod
    def from_json(cls, text: str) -> BlockPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: not a plan, an unknown version, or a damaged entry, by layer and block.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a block plan: {error}. The file is damaged or cut off.") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise PlanError(f"not a block plan: format is {found!r}, expected {FORMAT!r}")
        if body.get("version") != VERSION:
            raise PlanError(
                f"block plan version is {body.get('version')!r}, and this smt_ext reads {VERSION}. "
                "Update smt_ext, or plan again."
            )
        layers = {}
        try:
            for name, layer in body["layers"].items():
                try:
                    layers[name] = LayerPlan(
                        shape=layer["shape"],
                        block_size=layer["block_size"],
                        blocks=tuple(layer["blocks"]),
                    )
                except PlanError as error:
                    raise PlanError(f"layer {name!r}: {error}") from None
            groups, also = tuple(body["input_groups"]), dict(body.get("also_train", {}))
            plan = cls(layers, body["provenance"], groups, also)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"block plan has a missing or malformed entry: {error!r}") from None
        if body.get("fingerprint", plan.fingerprint) != plan.fingerprint:
            raise PlanError(
                "the plan's layers do not match its fingerprint: the file was damaged, or edited. "
                "Restore it or plan again; after an edit by hand remove the 'fingerprint' entry."
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        with replace_file(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockPlan:
        """Read a plan from a file.

        :func:`smt_ext.checkpoint.blocks.load_plan` also reads that of saved blocks.

        Raises:
            PlanError: no such file, or not a usable plan; names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PlanError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PlanError(f"cannot load a block plan from {os.fspath(path)!r}: {why}") from None

    def share_by(self, key: Any) -> dict[str, int]:
        """Trained parameters grouped by ``key(module name)``, in order of first appearance."""
        shares: defaultdict[str, int] = defaultdict(int)
        for name in sorted(self.layers, key=natural_order):
            shares[key(name)] += self.layers[name].num_parameters
        return dict(shares)

    def __str__(self) -> str:
        """How it was chosen, and tables of the budget by kind of module and by depth."""
        sizes = sorted({layer.block_size for layer in self.layers.values()})
        lines = [
            f"BlockPlan: {self.num_blocks:,} blocks, {self.num_parameters:,} parameters in "
            f"{sum(bool(x.blocks) for x in self.layers.values())} of {len(self.layers)} modules, "
            f"block size {', '.join(map(str, sizes))}"
        ]
        if self.also_train:
            lines.append(
                f"beside them {self.num_beside:,} parameters in {len(self.also_train)} tensors, whole"
            )
        if chosen := [f"{key} {self.provenance[key]}" for key in _CHOICE if key in self.provenance]:
            lines.append(", ".join(chosen))
        for title, key in (("kind", kind_of), ("depth", depth_of)):
            lines.append(f"{title:<20}{'blocks':>9}{'parameters':>14}{'share':>9}")
            blocks: defaultdict[str, int] = defaultdict(int)
            for name, layer in self.layers.items():
                blocks[key(name)] += len(layer.blocks)
            for group, count in self.share_by(key).items():
                share = count / max(1, self.num_parameters)
                lines.append(f"{group:<20}{blocks[group]:>9,}{count:>14,}{share:>9.1%}")
        return "\n".join(lines)

    def _layers_json(self) -> dict[str, Any]:
        return {
            name: {"shape": x.shape, "block_size": x.block_size, "blocks": x.blocks}
            for name, x in self.layers.items()
        }

    def _made_for(self) -> str:
        model_type = self.provenance.get("model_type")
        return f" ({model_type})" if model_type else ""


def kind_of(name: str) -> str:
    """The kind of a module: the last part of its name, such as ``v_proj``."""
    return name.rpartition(".")[2]


def depth_of(name: str) -> str:
    """The module's layer, such as ``layer 7``: the first number in its name."""
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return "no layer" if number is None else f"layer {number}"


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over names and shapes of all linear weights of a model."""
    linears = {name: m for name, m in model.named_modules() if _is_linear(m)}
    shapes = {name: list(shape_NK(m)) for name, m in {**linears, **dict(matrices(model))}.items()}
    return hashlib.sha256(_canonical(shapes).encode()).hexdigest()


def check_block_size(name: str, matrix: Matrix, block_size: int) -> None:
    """Raise PlanError where blocks of this size would reach over two experts."""
    if isinstance(matrix, ExpertMatrix) and (n := matrix.weight.shape[1]) % block_size:
        fits = [size for size in (512, 256, 128, 64, 32, 16) if n % size == 0]
        raise PlanError(
            f"block_size is {block_size}, and the experts in {name!r} have {n} rows each, of which it "
            f"is no divisor. Use {' or '.join(map(str, fits[:2])) or 'a divisor'}, or leave the "
            "experts out of the targets."
        )


def _is_linear(matrix: Matrix) -> bool:
    """Subclasses too: they have a shape, and :func:`smt_ext.patch` says why it refuses them."""
    if isinstance(matrix, ExpertMatrix):
        return True
    return isinstance(matrix, nn.Linear) or is_conv1d(matrix)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _pair(value: Any, what: str) -> tuple[int, int]:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(numbers) != 2 or not all(type(number) is int for number in numbers):
        raise PlanError(f"{what} is {value!r}, expected two whole numbers")
    return numbers[0], numbers[1]


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise PlanError(f"the shape of {name!r} is {value!r}, expected whole numbers above 0")
    return sizes


def natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _closest(name: str, names: Iterable[str]) -> str:
    kind = kind_of(name)
    match = next((other for other in names if kind_of(other) == kind), None)
    return f" (it has {match!r})" if match else ""
