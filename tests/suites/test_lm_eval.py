"""An exported checkpoint runs under lm-eval unchanged, and scores there what the suite says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import smt_ext
from models import llama_plan, save_checkpoint
from smt_ext.data import read_rows
from smt_ext.hf.loading import load_model, load_tokenizer
from smt_ext.suite_eval import evaluate_suite
from smt_ext.suites import parse_question
from suite_rows import write_sets

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval absent: pip install 'smt_ext[eval]'")

# The same prompt and the same continuation as --template plain has.
TASK = r"""
task: smt_ext_rows
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{stem}}}}\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_an_exported_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base = save_checkpoint(tmp_path / "base")
    model = load_model(str(base), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # else all options are equally likely
    smt_ext.patch(model, llama_plan(model))
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.add_(0.1 * torch.randn_like(module.blocks))
    smt_ext.sync_weights(model)
    tokenizer = load_tokenizer(str(base))
    exported = tmp_path / "exported"
    smt_ext.export(model, exported, tokenizer)

    write_sets(tmp_path / "data")
    questions = [
        parse_question(row, "choice")
        for row in read_rows(tmp_path / "data" / "commonsense" / "arc-e.jsonl")
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"stem": q.stem, "options": list(q.options), "gold": q.gold}) + "\n"
            for q in questions
        )
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.yaml").write_text(TASK.format(rows=rows))
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32"},
        tasks=["smt_ext_rows"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=10,
        log_samples=True,
    )

    smt_ext.unpatch(model)
    ours = evaluate_suite(
        model, tokenizer, "commonsense", tmp_path / "data", tmp_path / "out", sets=["arc-e"],
        measures=["likelihood"], progress=False,
    )  # fmt: skip
    scores = ours.sets[0].scores
    found = theirs["results"]["smt_ext_rows"]
    assert found["acc,none"] == pytest.approx(scores["likelihood"].accuracy)
    assert found["acc_norm,none"] == pytest.approx(scores["per byte"].accuracy)
    assert found["acc_stderr,none"] == pytest.approx(scores["likelihood"].stderr)
    log_p = {
        line["row"]: line["log_p"]
        for line in map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
        if "row" in line
    }
    samples = theirs["samples"]["smt_ext_rows"]
    assert len(samples) == len(log_p) == 20
    for sample in samples:
        values = [answer[0] for answer in sample["filtered_resps"]]
        # float32, sums of up to a dozen log-probabilities of magnitude 10.
        assert values == pytest.approx(log_p[sample["doc_id"]], rel=1e-4, abs=1e-3)
    assert max(max(v) - min(v) for v in log_p.values()) > 1, "the options must differ"
