"""Random calls of every operator through its checks, half of them with one argument that is wrong.

    python tests/ops/fuzz_calls.py [--sanitized] [SECONDS [SEED]]

Tensors lie between guard zones; with --sanitized, which compiles the operators with AddressSanitizer
and UndefinedBehaviorSanitizer, at the very ends of what is allocated for them. A right call passes, in
the kernel and in its fake with the same result's shape, dtype and strides; a wrong one is refused by
both, by the name of an argument, and changes nothing. Inputs and guard zones stay as they are, and the
same call gives the same bits. Wrong index values alone the fakes cannot see. The kernels alone:
tests/cpp/fuzz.cpp.
"""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))

from smt_ext import ops
from smt_ext.nn.tiles import tiles_of

TESTS = Path(__file__).parents[1]
SANITIZED = "SMT_EXT_FUZZ_SANITIZED"  # the folder whose smt_ext is sanitized
GUARD = 0 if SANITIZED in os.environ else 64
INTS = [-(2**62), -1, 0, 1, 8, 15, 513, 2**33, 2**62]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHER_DTYPES = [*DTYPES, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
# What only the kernel sees: values of indices, and the width that follows from them.
OF_VALUES = re.compile(r"expected indices in|strictly increasing|^width|\bwidth: expected")


class Case:
    """One random call: an operator, its arguments by name, and which of them it changes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.zones: list[Tensor] = []

    # Values

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> Tensor:
        """Between guard zones; in rows or, if ``strided``, in columns or with gaps."""
        kind = self.random.choice("rrcg") if strided and len(shape) == 2 else "r"
        held = tuple(reversed(shape)) if kind == "c" else shape
        if kind == "g":
            held = (shape[0], 2 * shape[1] + 1)
        count = 1
        for side in held:
            count *= side
        size = dtype.itemsize
        lead = GUARD + size * self.random.randrange(4 if GUARD else 1)
        lead += -lead % size
        zone = torch.full((lead + count * size + GUARD,), 0xA5, dtype=torch.uint8)
        self.zones.append(zone)
        inner = zone[lead : lead + count * size].view(dtype).view(held)
        if dtype.is_floating_point:
            inner.copy_(torch.randn(held, generator=self.generator, dtype=torch.float64))
        else:
            inner.copy_(torch.randint(0, 100, held, generator=self.generator))
        return inner.T if kind == "c" else inner[:, 1::2] if kind == "g" else inner

    def index(self, values: list[int]) -> Tensor:
        out = self.tensor((len(values),), torch.int32)
        return out.copy_(torch.tensor(values, dtype=torch.int32))

    def copied(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else self.tensor(tuple(value.shape), value.dtype).copy_(value)

    def grid(self) -> tuple[int, int, int, list[tuple[int, int]]]:
        size = self.random.choice([16, 17, 32, 48, 100])
        n, k = (self.random.choice([0, 1, size, self.random.randint(1, 3 * size)]) for _ in "nk")
        every = [(r, c) for r in range(-(-n // size)) for c in range(-(-k // size))]
        share = self.random.choice([0, 0.3, 1])
        return n, k, size, [block for block in every if self.random.random() < share]

    # Operators

    def gather_columns(self) -> dict[str, Any]:
        _, k, size, blocks = self.grid()
        cols = sorted({c for _, c in blocks})
        width = sum(min(size, k - c * size) for c in cols)
        x = self.tensor((self.tokens(), k), self.dtype(), True)
        return {"x": x, "col_blocks": self.index(cols), "block_size": size, "width": width,
                "dtype": self.random.choice([None, *DTYPES])}  # fmt: skip

    def block_grad(self) -> dict[str, Any]:
        n, u, size, blocks = self.grid()
        dtype, t = self.dtype(), self.tokens()
        wide = dtype == torch.float64
        rows, slots = [r for r, _ in blocks], [c for _, c in blocks]
        tiles, lone = tiles_of(rows, slots, size)
        return {"dy": self.tensor((t, n), dtype, True), "x_cols": self.tensor((t, u), dtype, True),
                "rows": self.index(rows), "slots": self.index(slots),
                "block_size": size, "out_dtype": None if wide else self.random.choice(DTYPES[:3]),
                "allow_tf32": False, "tiles": self.copied(tiles), "lone": self.copied(lone)}  # fmt: skip

    def block_grad_siblings(self) -> dict[str, Any]:
        _, u, size, blocks = self.grid()
        high = 1 + max((row for row, _ in blocks), default=0)
        firsts = sorted({0, *(self.random.randint(0, high) for _ in range(3))} - {high})
        heights = [end - first for first, end in pairwise([*firsts, high])]
        dtype, t = self.dtype(), self.tokens()
        dys = [
            self.tensor((t, h * size - self.random.randrange(size)), dtype, True) for h in heights
        ]
        rows, slots = [r for r, _ in blocks], [c for _, c in blocks]
        tiles, lone = tiles_of(rows, slots, size, first_rows=firsts)
        wide = dtype == torch.float64
        return {"dys": dys, "x_cols": self.tensor((t, u), dtype, True),
                "rows": self.index(rows), "slots": self.index(slots),
                "block_size": size, "out_dtype": None if wide else self.random.choice(DTYPES[:3]),
                "allow_tf32": False, "tiles": self.copied(tiles), "lone": self.copied(lone)}  # fmt: skip

    def block_grad_acc_(self) -> dict[str, Any]:
        made = self.block_grad()
        size, count = made["block_size"], len(made["rows"])
        out = self.tensor((count, size, size), made.pop("out_dtype") or made["dy"].dtype)
        return {"out": out, **made}

    def gather_blocks(self) -> dict[str, Any]:
        n, k, size, blocks = self.grid()
        return {"w": self.tensor((n, k), self.dtype(), True), **self.places(blocks),
                "block_size": size, "dtype": self.random.choice([None, *DTYPES])}  # fmt: skip

    def scatter_blocks_(self) -> dict[str, Any]:
        n, k, size, blocks = self.grid()
        return {"w": self.tensor((n, k), self.dtype(), True),
                "blocks": self.tensor((len(blocks), size, size), self.dtype()),
                **self.places(blocks)}  # fmt: skip

    def sparse_adamw_step_(self) -> dict[str, Any]:
        names = ("weights", "blocks", "grads", "exp_avgs", "exp_avg_sqs", "masters", "rows", "cols")
        lists: dict[str, Any] = {name: [] for name in names}
        dtype = self.dtype()
        moment = torch.float64 if dtype == torch.float64 else torch.float32
        masters = dtype.itemsize == 2 and self.random.random() < 0.5
        origins: list[Tensor] = []
        with_origins = self.random.random() < 0.5
        for _ in range(self.random.randint(1, 3)):
            n, k, size, blocks = self.grid()
            shape, places = (len(blocks), size, size), self.places(blocks)
            held = (n, k) if self.random.random() < 0.8 else (0, 0)
            lists["weights"].append(self.tensor(held, self.dtype(), True))
            for name, kind in (("blocks", dtype), ("grads", dtype), ("exp_avgs", moment)):
                lists[name].append(self.tensor(shape, kind))
            lists["exp_avg_sqs"].append(self.tensor(shape, moment).abs_())
            if masters:
                lists["masters"].append(self.tensor(shape, torch.float32))
            if with_origins:
                kind = min(self.dtype(), moment, key=lambda dtype: dtype.itemsize)
                origins.append(self.tensor(shape, kind))
            for name in ("rows", "cols"):
                lists[name].append(places[name])
        for name, value in (("step", 3), ("lr", 1e-2), ("grad_scale", 1),
                            ("found_inf", self.random.randrange(2))):  # fmt: skip
            lists[name] = self.tensor((), torch.float64).fill_(value)
        return {**lists, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
                "seed": self.random.randint(-1, 3), "origins": origins}  # fmt: skip

    def grad_norm(self) -> dict[str, Any]:
        shapes = [self.tensor((self.random.randint(0, 3), 16, 16), self.dtype()) for _ in "abc"]
        return {"grads": shapes[: self.random.randint(1, 3)]}

    def block_score(self) -> dict[str, Any]:
        n, k, size, _ = self.grid()
        return {"g": self.tensor((n, k), self.dtype(), True), "block_size": size,
                "metric": self.random.choice(ops.METRICS)}  # fmt: skip

    def block_score_fused(self) -> dict[str, Any]:
        n, k, size, _ = self.grid()
        dtype, t = self.dtype(), self.tokens()
        return {"dy": self.tensor((t, n), dtype, True), "x": self.tensor((t, k), dtype, True),
                "block_size": size, "metric": self.random.choice(ops.METRICS),
                "allow_tf32": False}  # fmt: skip

    def dequantize_4bit_with_blocks(self) -> dict[str, Any]:
        n, k, size, blocks = self.grid()
        group = self.random.choice([2, 64])
        return {"packed": self.tensor(((n * k + 1) // 2, 1), torch.uint8),
                "absmax": self.tensor((-(-n * k // group),), torch.float32),
                "code": self.tensor((16,), torch.float32), "group": group, "n": n, "k": k,
                "blocks": self.tensor((len(blocks), size, size), self.dtype()),
                **self.places(blocks), "dtype": self.dtype()}  # fmt: skip

    def dequantize_int8_with_blocks(self) -> dict[str, Any]:
        n, k, size, blocks = self.grid()
        return {"q": self.tensor((n, k), torch.int8), "absmax": self.tensor((n,), torch.float32),
                "blocks": self.tensor((len(blocks), size, size), self.dtype()),
                **self.places(blocks), "dtype": self.dtype()}  # fmt: skip

    def places(self, blocks: list[tuple[int, int]]) -> dict[str, Tensor]:
        return {
            "rows": self.index([r for r, _ in blocks]),
            "cols": self.index([c for _, c in blocks]),
        }

    def dtype(self) -> torch.dtype:
        return self.random.choice(DTYPES)

    def tokens(self) -> int:
        return self.random.choice([0, 1, 2, 31, self.random.randint(1, 70)])

    # Faults

    def spoil(self, value: Any) -> Any:
        """Another value in its place; the same object where none is known."""
        if isinstance(value, Tensor):
            return self.spoil_tensor(value)
        if isinstance(value, list):
            return self.spoil_list(value)
        if isinstance(value, bool) or value is None or isinstance(value, float):
            return value
        if isinstance(value, int):
            return self.random.choice(INTS)
        if isinstance(value, torch.dtype):
            return self.random.choice(OTHER_DTYPES)
        return "max"

    def spoil_list(self, value: list[Tensor]) -> list[Tensor]:
        at = self.random.randrange(len(value)) if value else 0
        how = self.random.randrange(3) if value else 3
        if how == 0:
            return value[:-1]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], self.spoil_tensor(value[at]), *value[at + 1 :]] if value else value

    def spoil_tensor(self, value: Tensor) -> Tensor:
        how = self.random.randrange(7)
        if value.dtype == torch.int32 and value.numel() and how == 0:
            bad = self.tensor(tuple(value.shape), value.dtype).copy_(value)
            at = self.random.randrange(bad.numel())
            bad.view(-1)[at] = self.random.choice([-1, 99, 2**31 - 1, -(2**31)])
            return bad
        dims = [d for d in range(value.dim()) if value.shape[d] > 1]
        shape = list(value.shape)
        if how < 2 or not dims:
            return self.tensor(tuple(shape), self.random.choice(OTHER_DTYPES))
        dim = self.random.choice(dims)
        if how == 2:
            return self.tensor((*shape, 1), value.dtype)
        if how == 3:
            return self.tensor(tuple(shape[1:]), value.dtype)
        if how == 6:  # the same shape, not contiguous
            return torch.repeat_interleave(value, 2, dim).narrow(dim, 0, 2 * shape[dim]).unflatten(
                dim, (shape[dim], 2)).select(dim + 1, 0)  # fmt: skip
        shape[dim] = 0 if how == 4 else shape[dim] + self.random.choice([-1, 1])
        return self.tensor(tuple(shape), value.dtype)


# Arguments that a call changes.
WRITES = {
    "block_grad_acc_": ("out",),
    "scatter_blocks_": ("w",),
    "sparse_adamw_step_": ("weights", "blocks", "exp_avgs", "exp_avg_sqs", "masters"),
}
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
NAMES = [name for name in vars(Case) if name in ops.__all__]


def attempt(call: Callable[..., Any], arguments: list[Any]) -> tuple[Any, Exception | None]:
    try:
        return call(*arguments), None
    except Exception as error:  # which kinds are right, fault_of says
        return None, error


def look(result: Any) -> Any:
    return None if result is None else (tuple(result.shape), result.dtype, result.stride())


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def fault_of(name: str, seed: int) -> str | None:
    """What is wrong with one random call; None if nothing is."""
    case = Case(seed)
    arguments = getattr(case, name)()
    wrong = case.random.random() < 0.5
    spoiled = ""
    if wrong:
        spoiled = case.random.choice(list(arguments))
        arguments[spoiled] = case.spoil(arguments[spoiled])
    call = getattr(torch.ops.smt_ext, name)
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(v) for v in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        traced, refused = attempt(call, [fake(v) for v in arguments.values()])
    before = bits(case.zones)
    done, error = attempt(call, list(arguments.values()))
    after = bits(case.zones)
    what = f"{name}({spoiled and spoiled + ' spoiled'})"
    if not wrong and error is not None:
        return f"{what} is right, and was refused: {error}"
    if error is not None and arguments.get("grads") == [] and name == "grad_norm":
        return None  # of no tensor, torch finds no operator
    if error is not None:
        text = str(error)
        if not isinstance(error, REFUSALS):
            return f"{what}: {type(error).__name__} in place of a refusal: {text}"
        if not any(re.search(rf"\b{key}\b", text) for key in (*arguments, "block_size", "out")):
            return f"{what}: the error names no argument: {text}"
        if not all(map(torch.equal, before, after)):
            return f"{what} was refused, and has changed something: {error}"
        if refused is None and not OF_VALUES.search(text):
            return f"{what}: the fake takes what the kernel refuses: {error}"
        return None
    if refused is not None:
        return f"{what}: the fake refuses what the kernel takes: {refused}"
    if look(done) != look(traced):
        return f"{what}: the fake gives {look(traced)}, the kernel {look(done)}"
    return _outside(name, arguments, case.zones, before, after) or _again(
        name, call, arguments, case.zones, before, after, done
    )


def _storage(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value] if isinstance(value, Tensor) else []


def _outside(
    name: str,
    arguments: dict[str, Any],
    zones: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
) -> str | None:
    """Bytes that changed and do not belong to an argument that the call may change."""
    free = {}
    for key in WRITES.get(name, ()):
        for tensor in _storage(arguments[key]):
            mask = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
            size = tensor.element_size()
            by_byte = mask.as_strided(
                (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1),
                tensor.storage_offset() * size,
            )  # fmt: skip
            by_byte.fill_(True)
            free[tensor.untyped_storage().data_ptr()] = mask
    for zone, old, new in zip(zones, before, after, strict=True):
        changed = old != new
        if (mask := free.get(zone.untyped_storage().data_ptr())) is not None:
            changed &= ~mask
        if changed.any():
            return f"{name} writes {int(changed.sum())} bytes outside of what it may change"
    return None


def _again(
    name: str, call: Callable[..., Any], arguments: dict[str, Any], zones: list[Tensor],
    before: list[Tensor], after: list[Tensor], done: Any,
) -> str | None:  # fmt: skip
    for zone, old in zip(zones, before, strict=True):
        zone.copy_(old)
    again = call(*arguments.values())
    same = all(map(torch.equal, after, zones))
    if done is not None and done.numel():
        one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (done, again))
        same = same and torch.equal(one, other)
    return None if same else f"{name}: the same call has given other bits"


def run(seconds: float, seed: int) -> tuple[int, list[str]]:
    """How many calls, and the first fault of each operator."""
    end, count, faults = time.monotonic() + seconds, 0, {}
    while time.monotonic() < end:
        name = NAMES[count % len(NAMES)]
        if name not in faults and (fault := fault_of(name, seed + count)) is not None:
            faults[name] = f"case {count} of seed {seed}: {fault}"
        count += 1
    return count, list(faults.values())


def sanitized(arguments: list[str]) -> int:
    """This program again, with sanitized operators; leaks of Python and torch are not looked for."""
    sys.path.append(str(TESTS))
    from build_cpp import sanitized_package, sanitizer_libraries

    package = str(sanitized_package())
    environment = {
        **os.environ, SANITIZED: package, "PYTHONPATH": package,
        "LD_PRELOAD": " ".join(sanitizer_libraries()), "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    if sys.argv[1:2] == ["--sanitized"]:
        return sanitized(sys.argv[2:])
    # Else this would be the plain operators' run once more.
    assert Path(ops.__file__).is_relative_to(os.environ.get(SANITIZED, "/")), ops.__file__
    torch.set_num_threads(1)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**31)
    print(f"seed {seed}", flush=True)
    count, faults = run(seconds, seed)
    print("\n".join(faults) or f"{count} calls, clean")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
