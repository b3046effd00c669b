"""Estimates of memory for the paper's models, beside what the paper says of them.

    python benchmarks/memory.py

Nothing is downloaded or computed: shapes alone (see smt_ext.estimation). The paper gives no sequence
length for its statements; where one is needed, the table says which was taken here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from common import print_table, save_record

from smt_ext.estimation.meta_model import METHODS, PRESETS
from smt_ext.estimation.table import Estimate, estimate

MODELS = ("llama-7b", "llama-13b", "llama-3-8b")
SHAPES = ((1, 2048), (16, 512), (256, 256))
PAPER: dict[str, Any] = {"block_size": 256, "targets": "qkv"}
GPUS = (8, 12, 16, 24, 48, 80)  # GB
FITTED = ("full", "lora", "smt", "qlora", "smt-4bit")
COLUMNS = ("model", "batch x seq", "method", "weights", "gradients", "optimizer", "saved", "peak")


def gigabytes(value: int) -> float:
    return round(value / 1e9, 2)


def rows_of(found: Estimate) -> list[dict[str, Any]]:
    return [
        {
            "model": found.model,
            "batch x seq": f"{found.batch} x {found.length}",
            "method": entry.title,
            "weights": gigabytes(entry.weights),
            "gradients": gigabytes(entry.gradients),
            "optimizer": gigabytes(entry.optimizer),
            "saved": gigabytes(entry.saved_bytes),
            "peak": gigabytes(entry.peak),
            "bytes": dataclasses.asdict(entry),
        }
        for entry in found.methods
    ]


def largest_models() -> list[dict[str, Any]]:
    """GB -> the largest known model that each method trains in it: one sequence, checkpointing."""
    rows = [{"GB": size, **{METHODS[method]: "none" for method in FITTED}} for size in GPUS]
    for method in FITTED:
        for model in PRESETS:  # smallest first
            found = estimate(model, methods=[method], gradient_checkpointing=True, **PAPER)
            peak = found[method].peak
            fits = [row for row in rows if peak <= row["GB"] * 10**9]
            for row in fits:
                row[METHODS[method]] = model
            if not fits:
                break
    return rows


def statements(found: dict[tuple[str, int, int], Estimate]) -> list[dict[str, str]]:
    """The paper's statements, each beside the estimates that come closest to its meaning."""
    small = found["llama-7b", 1, 2048]
    large = found["llama-7b", 256, 256]
    thirteen = found["llama-13b", 1, 2048]

    def saved_share(method: str) -> str:
        full, smt = small[method].peak, small["smt"].peak
        return f"{100 * (1 - smt / full):.0f} % ({gigabytes(full)} to {gigabytes(smt)} GB)"

    def saved_at_13b(method: str) -> str:
        return f"{gigabytes(thirteen[method].peak - thirteen['smt'].peak)} GB"

    activations = gigabytes(large["full"].saved_bytes - large["smt"].saved_bytes)
    linear = gigabytes(large["full"].saved["linear inputs"] - large["smt"].saved["linear inputs"])
    return [
        {
            "the paper": "full fine-tuning of 7B needs over 58 GB",
            "estimated": f"{gigabytes(small['full'].peak)} GB; with float32 master and moments "
            f"{gigabytes(small['full-master'].peak)} GB (1 x 2048)",
        },
        {
            "the paper": "SMT needs 67 % less than full fine-tuning",
            "estimated": f"{saved_share('full')}; against float32 master "
            f"{saved_share('full-master')} (7B, 1 x 2048)",
        },
        {
            "the paper": "76 GB less at 13B",
            "estimated": f"{saved_at_13b('full')}; against float32 master "
            f"{saved_at_13b('full-master')} (1 x 2048)",
        },
        {
            "the paper": "50 GB of activations less at batch 256",
            "estimated": f"{activations} GB, of them {linear} GB linear inputs (7B, 256 x 256)",
        },
    ]


def main() -> None:
    found = {
        (model, batch, length): estimate(model, batch=batch, length=length, **PAPER)
        for model in MODELS
        for batch, length in SHAPES
    }
    rows = [row for entry in found.values() for row in rows_of(entry)]
    print_table(rows, COLUMNS)
    print()
    said = statements(found)
    print_table(said, ("the paper", "estimated"))
    largest = largest_models()
    print_table(largest, tuple(largest[0]))
    settings = {
        **PAPER,
        "shapes": SHAPES,
        "dtype": "bfloat16",
        "plan": found["llama-7b", 1, 2048].plan,
    }
    print(f"record: {save_record('memory', settings, [*rows, *said, *largest])}")


if __name__ == "__main__":
    main()
