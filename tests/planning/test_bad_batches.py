"""Batches that cannot be planned from: an error that names the batch and the way out."""

from __future__ import annotations

import pytest
import torch

import smt_ext
from models import llama_plan, mlp, tiny_llama, token_batch
from smt_ext import DataError, PlanError


def plan(model, batches, **options):
    return smt_ext.make_plan(
        model, batches, **{"budget": "3 blocks", "block_size": 16, "progress": False, **options}
    )


def test_no_batch_and_empty_batch():
    with pytest.raises(DataError, match="planning saw no batch"):
        plan(tiny_llama(), [])
    with pytest.raises(DataError, match="batch 1 is empty"):
        plan(tiny_llama(), [token_batch(), token_batch(batch=0)])


def test_all_labels_masked():
    batch = token_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(DataError, match=r"batch 0 has no label to learn from: all are masked"):
        plan(tiny_llama(), [batch])


def test_no_loss():
    batch = token_batch()
    del batch["labels"]
    with pytest.raises(PlanError, match=r"batch 0 gave no scalar loss.*'labels'"):
        plan(tiny_llama(), [batch])


def test_a_loss_that_is_not_finite():
    with pytest.raises(PlanError, match="batch 1 gave the loss nan"):
        plan(
            mlp(), [torch.ones(2, 96), torch.full((2, 96), torch.nan)], targets="all-linear",
            loss_fn=lambda model, batch: model(batch).sum(),
        )  # fmt: skip


def test_a_gradient_that_is_not_finite_names_the_module():
    def loss_fn(model, batch):
        # Finite, with an infinite derivative at 0.
        return (model(batch) * 0).abs().sqrt().sum()

    with pytest.raises(PlanError, match=r"gradient of '\w+_proj' is inf or NaN in batch 0"):
        plan(mlp(), [torch.ones(2, 96)], targets="all-linear", loss_fn=loss_fn)


def test_a_loss_without_a_graph():
    with pytest.raises(PlanError, match="does not depend on any target module"):
        plan(
            mlp(), [torch.ones(2, 96)], targets="all-linear",
            loss_fn=lambda model, batch: model(batch).detach().sum(),
        )  # fmt: skip


def test_gradients_that_are_all_zero():
    x = torch.randn(4, 96)
    for scale in (0.0, 1e-44):  # the second underflows
        with pytest.raises(PlanError, match=r"every gradient of all 3 targets is 0 in 1 batches"):
            plan(
                mlp(), [x], targets="all-linear",
                loss_fn=lambda model, x, scale=scale: model(x).mean() * scale,
            )  # fmt: skip


def test_a_patched_model():
    model = tiny_llama()
    smt_ext.patch(model, llama_plan(model))
    with pytest.raises(PlanError, match=r"is patched already.*unpatch"):
        plan(model, [token_batch()])


@pytest.mark.parametrize("size", [0, 15, 513])
def test_block_size_out_of_range(size):
    with pytest.raises(PlanError, match=f"block_size is {size}, expected 16 to 512"):
        plan(tiny_llama(), [token_batch()], block_size=size)


@pytest.mark.parametrize(
    ("name", "value"), [("num_batches", 0), ("num_batches", 1.5), ("block_size", "32")]
)
def test_a_number_that_is_none_is_named(name, value):
    with pytest.raises(PlanError, match=f"{name} is {value!r}"):
        plan(tiny_llama(), [token_batch()], **{name: value})


class Averaging(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(32))
        self.register_buffer("replaced", torch.zeros(32))

    def forward(self, x):
        self.written.mul_(0.9).add_(x.detach().mean(0))
        self.replaced = 0.9 * self.replaced + x.detach().mean(0)
        return x


def test_planning_leaves_running_statistics_alone():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), Averaging())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(8, 32),) for _ in range(2)]
    plan(model, batches, targets="0", loss_fn=lambda m, b: m(*b).square().mean())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
