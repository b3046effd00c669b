"""Every writer of files dies, or writes half, at each rename, sync, write and removal that it does.

    python tests/checkpoint/crash.py

A run without a fault counts the calls. Then a process is forked for each of them, in which that call
ends the process: before it, after it, or, for a write, when half of the bytes are on the disk. What is
left must load, as the old artefact or the new one, whole; the next save must work and clear the rest.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import smt_ext
from models import mlp, mlp_plan
from smt_ext._files import replace_file
from smt_ext.checkpoint import base_digest  # noqa: F401
from smt_ext.checkpoint.delta import apply_delta

_CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod")


def trained(value: float) -> torch.nn.Module:
    model = smt_ext.patch(mlp(), mlp_plan())
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.fill_(value)
    return model


def _blocks(path: Path, value: float) -> None:
    smt_ext.save_blocks(trained(value), path, readme="card")


def _read_blocks(path: Path) -> float:
    model = smt_ext.load_blocks(mlp(), path)
    return float(model.up_proj.weight[32, 0])


def _state(path: Path, value: float) -> None:
    model = trained(value)
    smt_ext.save_training_state(path, model, smt_ext.SparseAdamW(model), step=1)


def _read_state(path: Path) -> float:
    model = smt_ext.patch(mlp(), mlp_plan())
    assert smt_ext.load_training_state(path, model, smt_ext.SparseAdamW(model)) == {"step": 1}
    return float(model.up_proj.weight[32, 0])


def _delta(path: Path, value: float) -> None:
    smt_ext.export(trained(value), path, "delta")


def _read_delta(path: Path) -> float:
    return apply_delta(mlp(), path).up_proj.weight[32, 0].item()


def _plan(path: Path, value: float) -> None:
    smt_ext.BlockPlan(mlp_plan().layers, {"value": value}).save(path)


def _read_plan(path: Path) -> float:
    return float(smt_ext.BlockPlan.load(path).provenance["value"])


def _file(path: Path, value: float) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(str(value))


def _read_file(path: Path) -> float:
    return float(path.read_text())


Writer = tuple[Callable[[Path, float], None], Callable[[Path], float]]
WRITERS: dict[str, Writer] = {
    "blocks": (_blocks, _read_blocks),
    "training state": (_state, _read_state),
    "delta": (_delta, _read_delta),
    "plan": (_plan, _read_plan),
    "file": (_file, _read_file),
}


class Fault:
    """Counts the calls that reach the disk, and ends the process at one of them."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0
        self.plain: dict[str, Any] = {name: getattr(os, name) for name in _CALLS}
        self.open = io.open

    def __enter__(self) -> Fault:
        for name, plain in self.plain.items():
            setattr(os, name, self._wrapped(plain))
        io.open = builtins.open = self._open  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for name, plain in self.plain.items():
            setattr(os, name, plain)
        io.open = builtins.open = self.open  # type: ignore[assignment]

    def _wrapped(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at and self.how == "before":
                os._exit(9)
            here = self.count == self.at
            try:
                return plain(*args, **kwargs)
            finally:
                if here:
                    os._exit(9)

        return call

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self.open(file, mode, *args, **kwargs)
        if "w" not in mode:
            return opened
        plain = opened.write

        def write(data: Any) -> int:
            self.count += 1
            if self.count == self.at:
                if self.how != "before":
                    plain(data[: len(data) // 2])
                    opened.flush()
                os._exit(9)
            return int(plain(data))

        opened.write = write
        return opened


def points(writer: Writer, folder: Path, mounted: bool) -> int:
    """How many calls one replacing save does."""
    save, _ = writer
    if mounted:
        (folder / "saved").mkdir()
    save(folder / "saved", 1.0)
    with Fault(0, "") as fault:
        save(folder / "saved", 2.0)
    return fault.count


def check(writer: Writer, folder: Path, at: int, how: str, mounted: bool) -> list[str]:
    """What is wrong after a crash at one point; all in forked processes but the save that crashes."""
    save, read = writer
    target = folder / "saved"
    if mounted:
        target.mkdir()
    save(target, 1.0)
    child = os.fork()
    if child == 0:
        try:
            with Fault(at, how):
                save(target, 2.0)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    faults = []
    if os.waitstatus_to_exitcode(status) != 9:
        faults.append("did not get there")
    try:
        if read(target) not in (1.0, 2.0):
            faults.append(f"holds {read(target)}")
        save(target, 3.0)
        if read(target) != 3.0:
            faults.append("the next save is not what is read")
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    if (left := sorted(path.name for path in folder.iterdir())) != ["saved"]:
        faults.append(f"left behind: {left}")
    if target.is_dir() and (hidden := [p.name for p in target.iterdir() if p.name[0] == "."]):
        faults.append(f"left inside: {hidden}")
    return faults


def run(name: str, mounted: bool) -> tuple[int, list[str]]:
    """Points tried and what went wrong for one writer; ``mounted``: its folder cannot be renamed."""
    plain = os.path.ismount
    if mounted:
        os.path.ismount = lambda path: True
    tried, faults = 0, []
    try:
        with tempfile.TemporaryDirectory() as root:
            first = Path(root, "count")
            first.mkdir()
            for at in range(1, points(WRITERS[name], first, mounted) + 1):
                for how in ("before", "after"):
                    folder = Path(root, f"{at}{how}")
                    folder.mkdir()
                    tried += 1
                    faults += [f"{name}, call {at}, {how}: {f}"
                               for f in check(WRITERS[name], folder, at, how, mounted)]  # fmt: skip
                    shutil.rmtree(folder)
    finally:
        os.path.ismount = plain
    return tried, faults


def main() -> int:
    torch.set_num_threads(1)
    total, wrong = 0, []
    for name in WRITERS:
        for mounted in (False, True) if name not in ("plan", "file") else (False,):
            tried, faults = run(name, mounted)
            where = ", on a mount point" if mounted else ""
            print(f"{name}{where}: {tried} crash points, {len(faults)} faults", flush=True)
            total, wrong = total + tried, wrong + faults
    print("\n".join(wrong) or f"all of {total} recover, nothing is left behind")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
