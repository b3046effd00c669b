"""Preference training against the exact original weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import smt_ext
from models import llama_plan, tiny_llama, token_batch
from smt_ext import CheckpointError, DataError, PatchError
from smt_ext.hf.config import SMTConfig
from smt_ext.hf.reference import ReferenceModel
from smt_ext.hf.trainers import SMTDPOTrainer, SMTSFTTrainer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

LIMITS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": 48,
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<eos>", "<pad>", *map(chr, range(32, 127))])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


def sums(count=6):
    return [(f"{a} + {a + 1} =", f" {2 * a + 1}", f" {a}") for a in range(count)]


def patched(**config):
    model = tiny_llama(**config)
    return smt_ext.patch(model, llama_plan(model))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dpo(folder, tokenizer, model, **kwargs):
    data = datasets.Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums()]
    )
    precompute = kwargs.pop("precompute", False)
    args = trl.DPOConfig(
        str(folder), save_strategy="no", precompute_ref_log_probs=precompute, **LIMITS
    )
    return trl.DPOTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer,
        optimizers=(smt_ext.SparseAdamW(model, lr=1e-2), None), **kwargs,
    )  # fmt: skip


def test_dpo_against_the_original_weights_needs_no_second_model(tmp_path, tokenizer):
    model = patched()
    # A second model that never trains, for comparison.
    second = dpo(tmp_path, tokenizer, patched(), ref_model=tiny_llama())
    second.train()
    shared = dpo(tmp_path, tokenizer, model, ref_model=ReferenceModel(model))
    assert sum(p.numel() for p in shared.ref_model.parameters()) == 0
    shared.train()
    precomputed = dpo(tmp_path, tokenizer, patched(), precompute=True)
    precomputed.train()
    again = patched()
    both = dpo(tmp_path, tokenizer, again, ref_model=ReferenceModel(again), precompute=True)
    both.train()

    expected = losses(second)
    assert expected[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference: log 2
    assert abs(expected[-1] - expected[0]) > 1e-3  # and soon is not
    assert losses(shared) == expected
    assert losses(precomputed) == losses(both) == expected
    for name, value in second.model.state_dict().items():
        assert torch.equal(shared.model.state_dict()[name], value)


def test_the_dpo_trainer_plans_on_its_own_loss_and_brings_the_reference(tmp_path, tokenizer):
    data = datasets.Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums()]
    )
    config = SMTConfig(budget="6 blocks", block_size=32, plan_batches=2)
    args = trl.DPOConfig(str(tmp_path), save_strategy="no", **LIMITS)
    made = SMTDPOTrainer(
        tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer, smt_config=config
    )
    assert sum(p.numel() for p in made.ref_model.parameters()) == 0
    made.train()
    assert made.plan.provenance["loss"] == pytest.approx(0.6931, abs=1e-3)
    # The same plan, and a second model that never trains.
    model = smt_ext.patch(tiny_llama(), made.plan)
    second = dpo(tmp_path, tokenizer, model, ref_model=tiny_llama())
    second.args.max_grad_norm = 1.0
    second.train()
    assert losses(made)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(made) == pytest.approx(losses(second), abs=1e-4)
    assert abs(losses(made)[-1] - losses(made)[0]) > 1e-3


@pytest.mark.parametrize(("name", "value"), [("label_smoothing", 0.1), ("max_length", 16)])
def test_a_resume_with_another_loss_is_refused_by_name(tmp_path, tokenizer, name, value):
    """Whatever TRL's arguments add to transformers' own: the rows are tokenized the same."""
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums()]

    def made(**settings):
        args = trl.DPOConfig(str(tmp_path), save_steps=1, **{**LIMITS, **settings})
        config = SMTConfig(budget="6 blocks", block_size=32, plan_batches=1)
        return SMTDPOTrainer(
            tiny_llama(), args=args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, smt_config=config,
        )  # fmt: skip

    made(max_steps=1).train()
    with pytest.raises(CheckpointError, match=f"{name} is {value}"):
        made(max_steps=2, **{name: value}).train(resume_from_checkpoint=True)


def test_reference_model_is_the_base_without_dropout():
    base = tiny_llama(attention_dropout=0.5).eval()
    model = copy.deepcopy(base).train()
    smt_ext.patch(model, llama_plan(model))
    smt_ext.train_also(model, ["model.norm.weight"])
    model.model.layers[1].eval()
    reference = ReferenceModel(model)
    with torch.no_grad():
        for module in smt_ext.smt_modules(model).values():
            module.blocks.add_(0.1)
        model.model.norm.weight.add_(0.1)
    smt_ext.sync_weights(model)
    batch = token_batch()
    modes = [module.training for module in model.modules()]
    loss = model(**batch).loss
    out = reference(**batch)
    assert torch.equal(out.logits, base(**batch).logits)
    assert not out.logits.requires_grad
    assert [module.training for module in model.modules()] == modes
    loss.backward()
    assert reference.config is model.config
    with pytest.raises(AttributeError, match="trained weights outside of a call"):
        _ = reference.lm_head
    state = reference.state_dict()
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    assert nn.ModuleList([reference]).state_dict() == {}
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = reference.no_such_thing
    with pytest.raises(PatchError, match="patch"):
        ReferenceModel(tiny_llama())


def test_what_the_reference_is_is_said(tmp_path, tokenizer, caplog):
    data = datasets.Dataset.from_list(
        [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums()]
    )

    def made(model, **more):
        args = trl.DPOConfig(str(tmp_path), save_strategy="no", **LIMITS, **more)
        return SMTDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    model = patched()
    made(model)
    assert "have been trained before" not in caplog.text
    with torch.no_grad():
        next(iter(smt_ext.smt_modules(model).values())).blocks.add_(1.0)
    made(model)
    assert "have been trained before" in caplog.text
    with pytest.raises(DataError, match="sync_ref_model"):
        made(patched(), sync_ref_model=True)


def rows(count=6):
    return [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums(count)]


def preferring(folder, tokenizer, model=None, data=None, held_out=None, **settings):
    config = SMTConfig(budget="6 blocks", block_size=32, plan_batches=1)
    return SMTDPOTrainer(
        tiny_llama() if model is None else model,
        args=trl.DPOConfig(str(folder), save_strategy="no", **{**LIMITS, **settings}),
        train_dataset=datasets.Dataset.from_list(rows()) if data is None else data,
        eval_dataset=held_out, processing_class=tokenizer, smt_config=config,
    )  # fmt: skip


def test_preferences_that_are_cut_are_counted(tmp_path, tokenizer, caplog):
    data = [
        *rows(2),  # ten tokens each with the end
        {"prompt": "2 =", "chosen": " 2", "rejected": " many, I would think"},
        {"prompt": "what is the sum of 2 and 3?", "chosen": " 5", "rejected": " 6"},
    ]
    table = datasets.Dataset.from_list(data)
    preferring(tmp_path, tokenizer, data=table, held_out=table, max_length=10)
    for name in ("train", "eval"):
        assert (
            f"{name}: max_length = 10: 1 of 4 rows are cut there, without their ends, and 1 left out"
        ) in caplog.text
    caplog.clear()
    preferring(tmp_path, tokenizer, data=datasets.Dataset.from_list(rows(5)), max_length=10)
    assert "max_length" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_preferences_beyond_the_embedding_are_named(tmp_path, tokenizer, stream):
    data = datasets.Dataset.from_list(
        [*rows(2), {"prompt": "~ =", "chosen": " 1", "rejected": "2"}]
    )
    small = tiny_llama(vocab_size=90)
    given = data.to_iterable_dataset() if stream else data
    with pytest.raises(DataError, match=r"training row 2: prompt_ids holds 97 at position 0"):
        preferring(tmp_path, tokenizer, small, given).train()
    with pytest.raises(DataError, match=r"held-out row 2: prompt_ids holds 97"):
        preferring(tmp_path, tokenizer, small, held_out=data)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": " "}, "'chosen': nothing to learn from"),
        ({"rejected": ""}, "'rejected': nothing to learn from"),
        ({"chosen": None}, "'chosen': a NoneType, expected text"),
        ({"rejected": " 1"}, "'chosen' and 'rejected' are the same"),
    ],
)
def test_preferences_without_a_preference_are_refused(tmp_path, tokenizer, row, says, stream):
    row = {"prompt": "0 + 1 =", "chosen": " 1", "rejected": " 0"} | row
    data = datasets.Dataset.from_list([*rows(1), row])
    given = data.to_iterable_dataset() if stream else data
    with pytest.raises(DataError, match=rf"training row 1: {says}"):
        preferring(tmp_path, tokenizer, data=given).train()
    if not stream:
        with pytest.raises(DataError, match=rf"held-out row 1: {says}"):
            preferring(tmp_path, tokenizer, held_out=data)


def test_chosen_messages_are_checked_by_the_chat_template(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turn = [{"role": "user", "content": "q"}]
    row = {"prompt": turn} | {
        key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")
    }
    given = datasets.Dataset.from_list([row])
    with pytest.raises(DataError, match=r"training row 0: 'chosen': the chat template writes no"):
        preferring(tmp_path, tokenizer, data=given)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content + eos_token")
    preferring(tmp_path, tokenizer, data=given)


def test_a_model_by_name_comes_with_its_revision(tmp_path, checkpoint, tokenizer, monkeypatch):
    """Its tokenizer too; and without a word that the settings were ignored."""
    import transformers

    asked = []
    for kind in (
        transformers.AutoTokenizer,
        transformers.AutoProcessor,
        transformers.LlamaForCausalLM,
    ):
        plain = kind.from_pretrained

        def from_pretrained(name, *args, plain=plain, kind=kind, **settings):
            asked.append(
                (kind.__name__, settings.get("revision"), settings.get("trust_remote_code"))
            )
            return plain(name, *args, **settings)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    init = {"revision": "v2", "trust_remote_code": True}
    for kind, config, data in (
        (SMTDPOTrainer, trl.DPOConfig, rows()),
        (SMTSFTTrainer, trl.SFTConfig, [{"prompt": p, "completion": c} for p, c, _ in sums()]),
    ):
        asked.clear()
        args = config(str(tmp_path), model_init_kwargs=init, **LIMITS)
        made = kind(checkpoint, args=args, train_dataset=datasets.Dataset.from_list(data))
        assert {(name, *rest) for name, *rest in asked} >= {
            ("LlamaForCausalLM", "v2", True), ("AutoProcessor", "v2", True)
        }  # fmt: skip
        assert {revision for _, revision, _ in asked} == {"v2"}
        assert made.processing_class.eos_token == "<eos>"
        assert args.model_init_kwargs == init
