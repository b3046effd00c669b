"""Accuracy by generated answers, before, during and after training, for any ``Trainer``.

::

    trainer = SFTTrainer(model, args, train_dataset=rows, ...)
    trainer.add_callback(ScoreCallback(trainer, prompts, golds, equation_is_right))
    trainer.train()

The log then has ``eval_accuracy`` and ``eval_accuracy_stderr`` at step 0 and at the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import DataError

__all__ = ["Accuracy", "ScoreCallback", "evaluating", "exact_match", "generate_answers"]

# A text, as its tokenizer takes it, or the turns of a conversation that its chat template renders.
Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        accuracy: 0 to 1.
        stderr: the sample's standard deviation over the root of ``rows``; None for a single row.
        rows: answers judged.
        step: optimizer steps taken before.
    """

    accuracy: float
    stderr: float | None
    rows: int
    step: int = 0

    @classmethod
    def of(cls, right: Sequence[bool], step: int = 0) -> Accuracy:
        """From one verdict a row."""
        rows, share = len(right), sum(right) / len(right)
        stderr = math.sqrt(share * (1 - share) / (rows - 1)) if rows > 1 else None
        return cls(share, stderr, rows, step)


class ScoreCallback(TrainerCallback):
    """Answers held-out prompts and logs the share of right ones as ``eval_accuracy``.

    It does so before the first step, after the last, and with ``on_evaluate=True`` at each evaluation
    (``metric_for_best_model="eval_accuracy"`` then works). Training does not notice: random state
    and modes of the modules are those of a run without it. In a distributed run each process answers
    its share of the prompts.

    Args:
        trainer: that the callback is added to.
        prompts: texts, or conversations up to the assistant's turn.
        golds: what each answer is compared with.
        is_right: ``is_right(answer, gold)``, such as :func:`exact_match`.
        max_new_tokens, batch_size: of :func:`generate_answers`.
        on_evaluate: also at each ``trainer.evaluate()``.

    Attributes:
        answers: the latest, one a prompt.
        history: an :class:`Accuracy` for each time, those before a resume left out.

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
        on_evaluate: bool = False,
    ) -> None:
        if not prompts or len(prompts) != len(golds):
            raise DataError(
                f"prompts has {len(prompts)} rows and golds {len(golds)}, expected as many of both, "
                "at least 1"
            )
        self.trainer = trainer
        self.prompts = prompts
        self.golds = golds
        self.is_right = is_right
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.at_evaluations = on_evaluate
        self.answers: list[str] = []
        self.history: list[Accuracy] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step; a resumed run has that in its log."""
        if state.global_step == 0:
            self.history = []
            self._score(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """At an evaluation, once a step however many data sets are evaluated then."""
        if not self.at_evaluations:
            return
        if not self.history or self.history[-1].step != state.global_step:
            self._score(state.global_step)
        if metrics is not None:
            metrics.update(self._metrics())  # what the trainer picks its best model by

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With the weights that the trainer leaves, the best ones where it loads these."""
        done = bool(self.history) and self.history[-1].step == state.global_step
        if not done or args.load_best_model_at_end:
            self._score(state.global_step)

    def _score(self, step: int) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with evaluating(model):
            with trainer.accelerator.autocast():
                self.answers = generate_answers(
                    model,
                    trainer.processing_class,
                    self.prompts,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    progress=not trainer.args.disable_tqdm,
                )
            right = [self.is_right(a, g) for a, g in zip(self.answers, self.golds, strict=True)]
            self.history.append(Accuracy.of(right, step))
            # In evaluation mode: TRL's trainers add pending averages of the current mode to a log.
            trainer.log(self._metrics())

    def _metrics(self) -> dict[str, float]:
        last = self.history[-1]
        metrics = {"eval_accuracy": last.accuracy}
        return metrics if last.stderr is None else {**metrics, "eval_accuracy_stderr": last.stderr}


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
    *,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answers, without special tokens and surrounding space.

    Prompts of like length share a batch, padded on the left; an answer stops at the tokenizer's or the
    model's end of text. Random state and modes of the modules stay as they were. Where
    ``torch.distributed`` runs, each process computes its share and all get all answers.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        prompts: texts, or conversations up to the assistant's turn.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts a batch.

    Raises:
        DataError: a prompt without a token, or a conversation without a chat template.
    """
    tokens = [_encode(prompt, tokenizer, row) for row, prompt in enumerate(prompts)]
    stops = _stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = next(model.parameters()).device
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if distributed
        else (0, 1)
    )
    order = sorted(range(len(prompts)), key=lambda i: (len(tokens[i]), i))
    # All processes run as many batches, since sharded models gather their weights in each.
    share = [order[min(i + rank, len(order) - 1)] for i in range(0, len(order), ranks)]
    mine: dict[int, str] = {}
    devices = [device] if device.type != "cpu" else []
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        evaluating(model),
    ):
        for start in tqdm(
            range(0, len(share), batch_size), "answers", leave=False, disable=not progress
        ):
            batch = share[start : start + batch_size]
            rows = [torch.tensor(tokens[i]) for i in batch]
            ids, mask = (
                pad_sequence(values, batch_first=True, padding_value=fill, padding_side="left")
                for values, fill in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
            )
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=stops or None,
            )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            mine.update(zip(batch, (text.strip() for text in texts), strict=True))
    parts = [mine]
    if distributed:
        parts = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(parts, mine)
    found = {index: text for part in parts for index, text in part.items()}
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
        ids = tokenizer(prompt)["input_ids"]
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
    elif tokenizer.chat_template is None:
        raise DataError(
            f"prompts[{row}] is a conversation, and the tokenizer has no chat template. Give texts, "
            "or the tokenizer of a chat model."
        )
    else:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
    if not ids:
        raise DataError(f"prompts[{row}] has no token: {prompt!r}")
    return list(ids)


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Chat models often end a turn with another token than the tokenizer's end of text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [*own, tokenizer.eos_token_id] if i is not None})
