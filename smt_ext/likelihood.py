"""How likely a model finds given answers to a prompt, batched.

The options of a question share its prompt, which is most of the text. Its keys and values are computed
once and shared by the options, where the model's cache allows that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORE_INDEX, Example, collate
from .evaluate import Autocast, evaluating, length_batches, pad_left
from .loss import AnswerLoss

__all__ = ["OptionScorer", "Request"]

_PROBE = 4  # requests that are computed in both ways


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and of each answer whose likelihood after it is asked for."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + max(map(len, self.answers))


class OptionScorer:
    """Sum of log p(token | prompt, tokens before) over the tokens of each answer, in nats.

    Whether sharing the prompt's keys and values gives the same as whole sequences do is checked on
    the first requests; if not (recurrent layers, caches that cannot be selected from), whole
    sequences are used from then on.

    Args:
        model: a causal language model of transformers.
        pad_id: any token id; padding is masked.
        autocast: makes the context that the model runs in.

    Attributes:
        shares_prompt: None until the first requests have been compared.
    """

    def __init__(self, model: nn.Module, pad_id: int, autocast: Autocast = nullcontext) -> None:
        self.model = model
        self.pad_id = pad_id
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self.loss = AnswerLoss(model)
        accepted = inspect.signature(model.forward).parameters
        needed = {"past_key_values", "position_ids", "attention_mask"}
        self.shares_prompt: bool | None = None if needed <= accepted.keys() else False
        # Without it the logits of all of the prompt's tokens would be made, and all but one dropped.
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int,
        title: str = "likelihood",
        progress: bool = True,
    ) -> Iterator[tuple[int, list[float]]]:
        """(request's index, the sum for each answer) batch by batch, requests of like length together.

        Args:
            batch_size: requests of a batch; each may have several answers.
        """
        with evaluating(self.model):
            for indices in length_batches(list(map(len, requests)), batch_size, title, progress):
                batch = [requests[i] for i in indices]
                sums = iter(self._sums(batch).tolist())
                for index, request in zip(indices, batch, strict=True):
                    yield index, [next(sums) for _ in request.answers]

    def _sums(self, batch: list[Request]) -> Tensor:
        if self.shares_prompt is None:
            self.shares_prompt = self._can_share(batch[:_PROBE])
        return self._shared(batch) if self.shares_prompt else self._whole(batch)

    def _can_share(self, batch: list[Request]) -> bool:
        try:
            shared = self._shared(batch)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False  # a cache of another kind
        return _agree(shared, self._whole(batch), self._compute_dtype())

    def _whole(self, batch: list[Request]) -> Tensor:
        """One sequence an answer, the prompt repeated; (all answers of the batch,)."""
        sequences = [
            [Example(r.prompt + a, (IGNORE_INDEX,) * len(r.prompt) + a, where="")]
            for r in batch
            for a in r.answers
        ]
        inputs = {k: v.to(self.device) for k, v in collate(sequences, self.pad_id).items()}
        with self.autocast():
            logits, labels = self.loss.answer_logits(inputs)
        owner = (inputs["labels"][:, 1:] != IGNORE_INDEX).nonzero()[:, 0]
        return _sum_by(owner, _log_p(logits, labels), len(sequences))

    def _shared(self, batch: list[Request]) -> Tensor:
        """Prompts first, then all answers on a copy of their prompt's keys and values."""
        model: Any = self.model
        prompts, prompt_mask = pad_left([r.prompt for r in batch], self.pad_id)
        prompts, prompt_mask = prompts.to(self.device), prompt_mask.to(self.device)
        with self.autocast():
            first = model(
                input_ids=prompts,
                attention_mask=prompt_mask,
                position_ids=_positions(prompt_mask),
                use_cache=True,
                **self._last_logits,
            )
        answers = [answer for request in batch for answer in request.answers]
        owner = torch.tensor(
            [i for i, r in enumerate(batch) for _ in r.answers], device=self.device
        )
        begins = torch.tensor([answer[0] for answer in answers], device=self.device)
        sums = _log_p(first.logits[:, -1].float()[owner], begins).double()
        if max(map(len, answers)) == 1:
            return sums
        ids, labels = (
            torch.full((len(answers), max(map(len, answers)) - 1), fill)
            for fill in (self.pad_id, IGNORE_INDEX)
        )
        for row, answer in enumerate(answers):
            ids[row, : len(answer) - 1] = torch.tensor(answer[:-1])
            labels[row, : len(answer) - 1] = torch.tensor(answer[1:])
        ids, labels = ids.to(self.device), labels.to(self.device)
        real = labels != IGNORE_INDEX
        mask = torch.cat([prompt_mask[owner], real.to(prompt_mask.dtype)], dim=1)
        cache = first.past_key_values
        cache.batch_select_indices(owner)
        with self.autocast():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=_positions(mask)[:, prompts.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            ).logits
        rest = _log_p(logits[real], labels[real])
        return sums + _sum_by(real.nonzero()[:, 0], rest, len(answers))

    def _compute_dtype(self) -> torch.dtype:
        with self.autocast():
            if torch.is_autocast_enabled(self.device.type):
                return torch.get_autocast_dtype(self.device.type)
        return next(self.model.parameters()).dtype


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def _sum_by(owner: Tensor, values: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(
        0, owner, values.double()
    )


def _agree(shared: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
    """Up to rounding: the same products, summed in another order and over other padding."""
    share = 0.03 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((shared - whole).abs().max() <= share * whole.abs().max())
