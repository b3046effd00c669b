"""Every code block of README.md and docs/ runs, page by page, in the page's order.

Python blocks of a page share one namespace, which starts with a small model and its data; ``smt-ext``
commands run in the same folder. A block that cannot run here stands in NOT_RUN with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

from models import save_checkpoint
from smt_ext.cli import entry as cli
from smt_ext.cli.train import parse
from smt_ext.hf.loading import load_model, load_tokenizer
from smt_ext.hf.word_problems import make_problems
from suite_rows import write_sets

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# First words of a command -> why it does not run here.
NOT_RUN = {
    "pip install": "changes the environment that the tests run in",
    "make": "sets up an environment; make test is what runs this",
    "vllm serve": "needs vLLM and a GPU",
    "python -m benchmarks.quality": "takes hours; tests/quality runs it on a tiny model",
    "python benchmarks/step.py": "takes minutes alone; tests/benchmarks runs its parts",
    "lm_eval": "tests/eval/test_eval.py runs the same task files",
    "torchrun": "several processes; tests/distributed/test_examples.py runs the same scripts",
    "accelerate launch": "the same; with FSDP2 it needs GPUs, or what tests/fsdp_on_cpu.py does",
}
# A placeholder such as <folder | hub name | model.gguf>, and models that cannot be had here.
PLACEHOLDER = re.compile(r"<[^<>\n]+>|(?<=--model )(?:smollm2|[\w-]+/[\w.-]+)\b")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in tokens
        if token.type == "fence" and token.map is not None
    ]


def commands_of(block: Block) -> Iterator[str]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield " ".join(line.split())


def reason_not_run(command: str) -> str | None:
    return next((NOT_RUN[k] for k in NOT_RUN if f"{command} ".startswith(f"{k} ")), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for a plan of 0.84 % in blocks of 256, word problems, evaluation sets."""
    root = tmp_path_factory.mktemp("pages")
    save_checkpoint(
        root / "model", vocab_size=16384, hidden_size=256, intermediate_size=512,
        max_position_embeddings=1024,
    )  # fmt: skip
    for split, count in (("train", 40), ("test", 8)):
        name = "train.jsonl" if split == "train" else "held_out.jsonl"
        rows = make_problems(count, split=split)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sets(root / "data")
    return root


@pytest.fixture
def namespace(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted, in a folder of their own."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(97, (2, 24), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    return {
        "__name__": "__main__",
        "model": load_model("model", torch.float32),
        "base": load_model("model", torch.float32),
        "tokenizer": load_tokenizer("model"),
        "batches": batches,
        "batch": batches[0],
        "loader": batches,
        "scheduler": None,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, namespace: dict[str, Any]) -> None:
    for block in blocks_of(page):
        run(block, namespace)


def run(block: Block, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        # Blank lines in front: a traceback shows the line of the page.
        source = "\n" * block.line + block.text
        exec(compile(source, str(block.page), "exec"), namespace)
    elif block.language == "sh":
        for command in commands_of(block):
            if reason_not_run(command) is None:
                words = shlex.split(PLACEHOLDER.sub("model", command), comments=True)
                assert words[0] == "smt-ext", f"{block}: {command!r} neither runs nor is in NOT_RUN"
                assert cli.main(words[1:]) == 0, f"{block}: {command}"
    elif block.language == "yaml":
        Path("page.yaml").write_text(block.text, encoding="utf-8")
        parse(["--config", "page.yaml"])
    elif block.language == "json":
        json.loads(block.text)
    else:
        # Output, layouts and Sphinx directives; code must name its language.
        assert block.language in ("", "text") or block.language.startswith("{"), str(block)
        assert "import " not in block.text, f"{block} looks like code, and has no language"


def test_no_reason_is_stale() -> None:
    commands = [
        command
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "sh"
        for command in commands_of(block)
    ]
    for words in NOT_RUN:
        assert any(f"{command} ".startswith(f"{words} ") for command in commands), words


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
