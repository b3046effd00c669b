"""Batched option scores equal those of one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import tiny_llama
from smt_ext.likelihood import OptionScorer, Request

PAD = 3


def sharp(model: nn.Module) -> nn.Module:
    """Random weights large enough that tokens before matter; the default ones give uniform logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    )


def requests(seed: int = 0) -> list[Request]:
    """Prompts of 1 to 30 tokens with 2 to 4 answers of 1 to 9 tokens; one with one-token answers."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(128, (length,), generator=generator).tolist())

    made = []
    for prompt, lengths in (
        (12, (1, 1)),
        (30, (9, 2, 1)),
        (1, (3, 3)),
        (7, (4, 1, 5, 2)),
        (7, (6, 2)),
    ):
        made.append(Request(ids(prompt), tuple(ids(length) for length in lengths)))
    return made


@torch.no_grad()
def one_by_one(model: nn.Module, request: Request) -> list[float]:
    sums = []
    for answer in request.answers:
        ids = torch.tensor([request.prompt + answer])
        log_p = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        begin = len(request.prompt)
        sums.append(sum(float(log_p[begin + i - 1, token]) for i, token in enumerate(answer)))
    return sums


@pytest.mark.parametrize("make", [tiny_llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equals_one_sequence_at_a_time(make, batch_size):
    model = sharp(make())
    asked = requests()
    expected = [one_by_one(model, request) for request in asked]
    spread = torch.tensor([max(e) - min(e) for e in expected])
    assert spread.max() > 5, "the options must differ for the test to say anything"
    scorer = OptionScorer(model, PAD)
    for _ in range(2):
        scored = dict(scorer.score(asked, batch_size=batch_size, progress=False))
        assert sorted(scored) == list(range(len(asked)))
        for index, sums in scored.items():
            # float32: log-probabilities of magnitude 30, sums over 9 of them.
            torch.testing.assert_close(
                torch.tensor(sums, dtype=torch.float64),
                torch.tensor(expected[index], dtype=torch.float64),
                rtol=1e-5,
                atol=1e-4,
            )
        assert scorer.shares_prompt is True


def test_a_cache_that_is_not_one_is_noticed():
    class Forgetful(nn.Module):
        """Answers from the last tokens alone, whatever cache it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = sharp(tiny_llama())
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                    use_cache=False):  # fmt: skip
            return self.inner(
                input_ids=input_ids,
                attention_mask=attention_mask[:, -input_ids.shape[1] :],
                use_cache=use_cache,
            )

    model = Forgetful()
    scorer = OptionScorer(model, PAD)
    asked = requests()[1:]
    for _ in range(2):
        scored = dict(scorer.score(asked, batch_size=2, progress=False))
        assert scorer.shares_prompt is False
        for index, request in enumerate(asked):
            assert scored[index] == pytest.approx(
                one_by_one(model.inner, request), rel=1e-5, abs=1e-4
            )


def test_the_prompt_runs_once():
    model = sharp(tiny_llama())
    tokens = []
    model.model.embed_tokens.register_forward_hook(
        lambda m, args, out: tokens.append(args[0].numel())
    )
    scorer = OptionScorer(model, PAD)
    scorer.shares_prompt = True
    list(scorer.score(requests()[1:2], batch_size=1, progress=False))
    # 30 tokens of prompt; three answers of 9, 2 and 1 tokens, each without its last, padded to 8.
    assert tokens == [30, 3 * 8]


def test_the_mode_is_restored():
    model = tiny_llama().train()
    list(OptionScorer(model, PAD).score(requests()[:1], batch_size=1, progress=False))
    assert model.training
