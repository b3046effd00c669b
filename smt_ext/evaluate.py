"""Held-out loss, and accuracy by generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import TrainConfig
from .data import Example, Row, Template, collate, encode
from .errors import DataError
from .loss import AnswerLoss
from .task import equation_is_right

__all__ = [
    "SCORERS",
    "Quality",
    "accuracy",
    "evaluate",
    "evaluating",
    "generate_answers",
    "held_out_loss",
    "iter_answers",
    "length_batches",
    "pad_left",
]


def exact_match(text: str, gold: str) -> bool:
    """Whether the first line of the generated text is the gold answer, up to case and space."""
    return " ".join(text.split("\n")[0].split()).casefold() == " ".join(gold.split()).casefold()


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "equation": equation_is_right,
    "exact": exact_match,
}

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Quality:
    """What the held-out rows say: mean loss in nats a token, and share of right answers."""

    loss: float | None = None
    accuracy: float | None = None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    autocast: Autocast = nullcontext,
    progress: bool = True,
) -> tuple[Quality, list[str]]:
    """Loss and, where ``config.score`` asks for it, accuracy; and the generated answers."""
    loss = held_out_loss(
        model,
        examples,
        pad_id=tokenizer.pad_token_id,
        batch_size=config.eval_batch_size,
        autocast=autocast,
        progress=progress,
    )
    if config.score == "none":
        return Quality(loss), []
    answers = generate_answers(
        model,
        tokenizer,
        rows,
        template=config.template,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.eval_batch_size,
        autocast=autocast,
        progress=progress,
    )
    return Quality(loss, accuracy(answers, rows, config.score)), answers


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int,
    autocast: Autocast = nullcontext,
    progress: bool = True,
) -> float:
    """Mean cross entropy in nats over all answer tokens of the examples."""
    loss = AnswerLoss(model)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for indices in length_batches(
            [len(e) for e in examples], batch_size, "held-out loss", progress
        ):
            batch = collate([[examples[i]] for i in indices], pad_id)
            with autocast():
                logits, labels = loss.answer_logits({k: v.to(device) for k, v in batch.items()})
            total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
    return total / count


def generate_answers(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], **settings: Any
) -> list[str]:
    """The model's greedy answer to each row; the settings are those of :func:`iter_answers`."""
    answers = [""] * len(rows)
    for index, text in iter_answers(model, tokenizer, rows, **settings):
        answers[index] = text
    return answers


@torch.no_grad()
def iter_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    template: Template,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    autocast: Autocast = nullcontext,
    title: str = "answers",
    progress: bool = True,
) -> Iterator[tuple[int, str]]:
    """(row's index, the model's greedy answer) batch by batch, rows of like length together."""
    prompts = [
        encode(row, tokenizer, max_length=max_length, template=template, with_answer=False)
        for row in rows
    ]
    device = next(model.parameters()).device
    with evaluating(model):
        for indices in length_batches([len(p) for p in prompts], batch_size, title, progress):
            ids, mask = pad_left([prompts[i].input_ids for i in indices], tokenizer.pad_token_id)
            length = ids.shape[1]
            with autocast():
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=_stop_ids(model, tokenizer),
                )
            texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                yield index, text.strip()


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and their attention mask, so that all prompts end in the last column."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def accuracy(answers: Sequence[str], rows: Sequence[Row], score: str) -> float:
    """Share of right answers, 0 to 1.

    Args:
        score: ``equation`` (the left side of the first line evaluates to the row's ``answer``) or
            ``exact`` (the first line is the row's ``answer``, or its output where it has none).

    Raises:
        DataError: a row without the answer that ``equation`` needs.
    """
    right = SCORERS[score]
    hits = 0
    for text, row in zip(answers, rows, strict=True):
        gold = row.answer
        if gold is None and score == "exact":
            gold = row.messages[-1]["content"] if row.messages else row.completion
        if gold is None:
            raise DataError(f"{row.where}: score = {score!r} needs a field 'answer'")
        hits += right(text, gold)
    return hits / len(rows)


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Chat models often end a turn with another token than the tokenizer's end of text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [*own, tokenizer.eos_token_id] if i is not None})


def length_batches(
    lengths: Sequence[int], batch_size: int, title: str, progress: bool
) -> Iterator[list[int]]:
    """Indices in batches of like length, under a progress bar."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, title, leave=False, disable=not progress):
        yield order[start : start + batch_size]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while, its head fed contiguous inputs."""
    training = model.training
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
        model.train(training)
