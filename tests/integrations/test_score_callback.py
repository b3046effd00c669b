"""Generated answers: equal to one prompt at a time, judged, logged, and unseen by training."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

import smt_ext
from models import llama_plan, save_checkpoint, token_batch
from smt_ext import DataError
from smt_ext.hf.loading import load_model, load_tokenizer
from smt_ext.hf.score_callback import ScoreCallback, exact_match, generate_answers

PROMPTS = ["2 + 2 =", "A much longer question, which asks for five: 10 / 2 =", "x", "7 - 3 ="]
NEW = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"), attention_dropout=0.3)


def loaded(checkpoint):
    """A model whose answers depend on the prompt, in training mode but for one layer."""
    model = load_model(str(checkpoint), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.train()
    model.model.layers[1].eval()
    return model, load_tokenizer(str(checkpoint))


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, stop=None):
    """Greedy decoding without cache or padding."""
    model.eval()
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    while len(ids) < begin + NEW and (len(ids) == begin or ids[-1] != stop):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_answers_equal_one_prompt_at_a_time(checkpoint, batch_size):
    model, tokenizer = loaded(checkpoint)
    modes = [module.training for module in model.modules()]
    found = generate_answers(model, tokenizer, PROMPTS, NEW, batch_size)
    assert [module.training for module in model.modules()] == modes
    assert len(set(found)) == len(PROMPTS), "the answers must differ for the test to say anything"
    assert found == [one_by_one(model, tokenizer, prompt) for prompt in PROMPTS]


def test_an_answer_ends_at_the_models_own_end_of_turn(checkpoint):
    model, tokenizer = loaded(checkpoint)
    whole = one_by_one(model, tokenizer, PROMPTS[0])
    stop = tokenizer(whole[2])["input_ids"][0]
    assert whole.index(whole[2]) == 2
    model.generation_config.eos_token_id = [stop]
    ended = generate_answers(model, tokenizer, PROMPTS[:2], NEW, 2)
    assert ended[0] == whole[:3]
    assert ended == [one_by_one(model, tokenizer, prompt, stop) for prompt in PROMPTS[:2]]


def test_conversations_take_the_chat_template(checkpoint):
    model, tokenizer = loaded(checkpoint)
    turns = [{"role": "user", "content": PROMPTS[0]}]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    (found,) = generate_answers(model, tokenizer, [turns], NEW, 1)
    assert found == one_by_one(model, tokenizer, f"[{PROMPTS[0]}]>")
    assert found != one_by_one(model, tokenizer, PROMPTS[0])


def test_an_empty_prompt_is_named(checkpoint):
    with pytest.raises(DataError, match=r"prompts\[1\] has no token"):
        generate_answers(*loaded(checkpoint), ["a", ""], NEW, 2)


def test_exact_match_compares_as_many_lines_as_the_gold_answer_has():
    assert exact_match("\none\ntwo\nthree", "One\ntwo")
    assert not exact_match("one", "one\ntwo")
    assert exact_match(" The  Answer\nis more", "the answer")
    assert not exact_match("the answer is", "the answer")


def trainer_of(checkpoint, folder, **overrides):
    model, tokenizer = loaded(checkpoint)
    smt_ext.patch(model, llama_plan(model))
    batch = token_batch(seed=1, batch=8)
    rows = [{key: value[i] % 90 for key, value in batch.items()} for i in range(8)]
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, **overrides,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=rows, eval_dataset=rows[:4],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(smt_ext.SparseAdamW, {"lr": 0.05}),
    )  # fmt: skip


def scored(trainer):
    """With golds that the model gives for half of the prompts before training."""
    answers = generate_answers(trainer.model, trainer.processing_class, PROMPTS, NEW, 4)
    golds = [answer if i % 2 else "nothing" for i, answer in enumerate(answers)]
    callback = ScoreCallback(trainer, PROMPTS, golds, exact_match, max_new_tokens=NEW, batch_size=4)
    trainer.add_callback(callback)
    return callback


def test_before_and_after_are_logged_and_training_does_not_notice(checkpoint, tmp_path):
    plain = trainer_of(checkpoint, tmp_path / "plain", eval_on_start=True)
    plain.train()
    trainer = trainer_of(checkpoint, tmp_path / "scored", eval_on_start=True)
    callback = scored(trainer)
    trainer.train()
    trainer.evaluate()
    logged = [e for e in trainer.state.log_history if "eval_accuracy" in e]
    assert [e["step"] for e in logged] == [0, 4]
    assert logged[0]["eval_accuracy"] == 0.5
    assert logged[0]["eval_accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert callback.answers == generate_answers(
        trainer.model, trainer.processing_class, PROMPTS, NEW, 4
    )
    for (name, value), expected in zip(
        trainer.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_evaluations_hand_it_to_the_choice_of_the_best_step(checkpoint, tmp_path):
    trainer = trainer_of(
        checkpoint, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_accuracy",
    )  # fmt: skip
    scored(trainer)
    trainer.train()
    found = {
        e["step"]: e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e
    }
    assert found.keys() == {2, 4}
    assert trainer.state.best_metric == max(found.values())
    assert trainer.evaluate()["eval_accuracy"] == found[trainer.state.best_global_step]


def test_golds_for_every_prompt(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path)
    for prompts, golds in ((["a", "b"], ["c"]), ([], [])):
        with pytest.raises(DataError, match="expected as many"):
            ScoreCallback(trainer, prompts, golds, exact_match)
