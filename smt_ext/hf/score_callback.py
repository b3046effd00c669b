"""Accuracy by generated answers, for any ``Trainer``; docs/evaluation.md shows it at work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import DataError

__all__ = ["ScoreCallback", "evaluating", "exact_match", "generate_answers"]

# A text, as its tokenizer takes it, or the turns of a conversation that its chat template renders.
Prompt = str | Sequence[dict[str, Any]]


class ScoreCallback(TrainerCallback):
    """At each evaluation, answers held-out prompts and logs the share of right ones.

    It is also among the evaluation's metrics, so ``metric_for_best_model="eval_accuracy"`` works.

    Args:
        trainer: that the callback is added to.
        prompts: texts, or conversations up to the assistant's turn; ``answers`` has the latest answers.
        golds: what each is compared with, by ``is_right(answer, gold)`` such as :func:`exact_match`.
        max_new_tokens, batch_size: of :func:`generate_answers`.

    Raises:
        DataError: no prompts, or another number of golds.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        golds: Sequence[str],
        is_right: Callable[[str, str], bool],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> None:
        if not prompts or len(prompts) != len(golds):
            raise DataError(
                f"{len(prompts)} prompts and {len(golds)} golds, expected as many, >= 1"
            )
        self.trainer, self.prompts, self.golds, self.is_right = trainer, prompts, golds, is_right
        self.limits = (max_new_tokens, batch_size)
        self.answers: list[str] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer, judge and log."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with evaluating(model), trainer.accelerator.autocast():
            tokenizer = trainer.processing_class
            self.answers = generate_answers(model, tokenizer, self.prompts, *self.limits)
            right = [self.is_right(a, g) for a, g in zip(self.answers, self.golds, strict=True)]
            rows, share = len(right), sum(right) / len(right)
            found = {"eval_accuracy": share}
            if rows > 1:
                found["eval_accuracy_stderr"] = math.sqrt(share * (1 - share) / (rows - 1))
            kwargs["metrics"].update(found)  # what the trainer picks its best model by
            # In evaluation mode: TRL's trainers add pending averages of the current mode to a log.
            trainer.log(found)


def exact_match(answer: str, gold: str) -> bool:
    """Whether an answer's first lines, as many as the gold answer has, are it, up to case and space."""
    lines = gold.strip().count("\n") + 1
    begin = " ".join(answer.strip().split("\n")[:lines])
    return " ".join(begin.split()).casefold() == " ".join(gold.split()).casefold()


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """The greedy answers of a causal language model of transformers, without special tokens.

    Prompts (texts, or conversations up to the assistant's turn) of like length share a batch, padded on
    the left; an answer stops at the tokenizer's or the model's end of text.

    Raises:
        DataError: a prompt without a token.
    """
    tokens = [_encode(prompt, tokenizer, row) for row, prompt in enumerate(prompts)]
    # Chat models often end a turn with another token than the tokenizer's end of text.
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    stops = sorted(ends - {None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    found: dict[int, str] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(tokens[batch[-1]])
            gaps = [longest - len(tokens[i]) for i in batch]
            ids = [[pad] * gap + tokens[i] for i, gap in zip(batch, gaps, strict=True)]
            mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
            out = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                repetition_penalty=1.0, min_new_tokens=0,  # of whatever the model asks for
                pad_token_id=pad, eos_token_id=stops or None,
            )  # fmt: skip
            texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            found.update(zip(batch, (text.strip() for text in texts), strict=True))
    return [found[i] for i in range(len(prompts))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while, its head fed contiguous inputs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    # Generation slices the last position out of the hidden states. With a frozen head, torch's matmul
    # would answer such an input with one copy of the head's weight for each row of the batch.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    hook = head and head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        if hook:
            hook.remove()
        for module in training:
            module.training = True


def _encode(prompt: Prompt, tokenizer: Any, row: int) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids.pop()
    else:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
    if not ids:
        raise DataError(f"prompts[{row}] has no token: {prompt!r}")
    return ids
