"""Packing, padding and the order of batches."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import tiny_llama
from smt_ext import DataError
from smt_ext.data import IGNORE_INDEX, BatchOrder, Example, collate, pack


def example(length, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    ids = tuple(torch.randint(1, 128, (length,), generator=generator).tolist())
    masked = length // 3
    return Example(ids, (IGNORE_INDEX,) * masked + ids[masked:], f"rows:{seed}")


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths=lengths)
def test_packing_keeps_every_row_whole_and_within_the_length(lengths):
    examples = [example(n, i) for i, n in enumerate(lengths)]
    bins = pack(examples, 40)
    assert sorted(e.where for b in bins for e in b) == sorted(e.where for e in examples)
    assert all(sum(map(len, b)) <= 40 for b in bins)
    # First fit: no two bins could be one.
    sums = [sum(map(len, b)) for b in bins]
    assert all(a + b > 40 for i, a in enumerate(sums) for b in sums[:i])


def test_packed_rows_do_not_see_each_other():
    model = tiny_llama().eval()
    rows = [example(9, 1), example(7, 2), example(5, 3)]
    batch = collate([[rows[0], rows[1]], [rows[2]]], pad_id=0)
    assert batch["attention_mask"].shape == (2, 1, 16, 16)
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        for row, (line, begin) in zip(rows, ((0, 0), (0, 9), (1, 0)), strict=True):
            alone = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            torch.testing.assert_close(packed[line, begin : begin + len(row)], alone)


def test_packing_changes_neither_loss_nor_gradient():
    rows = [example(9, 1), example(7, 2), example(5, 3), example(11, 4)]
    losses, grads = [], []
    for sequences in ([[r] for r in rows], pack(rows, 20)):
        model = tiny_llama(torch.float64)
        loss = model(**collate(sequences, pad_id=0)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.model.layers[0].self_attn.v_proj.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-9)


def test_padding_changes_nothing():
    model = tiny_llama().eval()
    rows = [example(12, 1), example(5, 2)]
    batch = collate([[r] for r in rows], pad_id=7)
    assert batch["labels"][1, 5:].eq(IGNORE_INDEX).all()
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 5 + [0] * 7]
    with torch.no_grad():
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = model(input_ids=torch.tensor([rows[1].input_ids])).logits[0]
    torch.testing.assert_close(padded[1, :5], alone)


def test_a_pad_token_that_is_also_end_of_text_is_masked_by_position():
    row = Example((3, 4, 9), (IGNORE_INDEX, 4, 9), "rows:1")
    batch = collate([[row], [example(6)]], pad_id=9)
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 4, 9, *[IGNORE_INDEX] * 3]


@given(lengths=lengths, size=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_epoch_takes_every_item_once(lengths, size, seed):
    order = BatchOrder(lengths, size, seed)
    count = order.batches_per_epoch
    for epoch in range(2):
        batches = [order[epoch * count + i] for i in range(count)]
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        assert all(len(b) <= size for b in batches)


def test_epochs_differ_and_any_batch_can_be_asked_for_first():
    order = BatchOrder(list(range(100)), 4, seed=3)
    first = [order[i] for i in range(50)]
    assert first[:25] != first[25:]
    late = BatchOrder(list(range(100)), 4, seed=3)
    assert list(islice(late.from_batch(37), 13)) == first[37:]
    assert [BatchOrder(list(range(100)), 4, seed=4)[i] for i in range(25)] != first[:25]


def test_batches_hold_items_of_like_length():
    lengths = [10 + (i * 37) % 90 for i in range(256)]
    order = BatchOrder(lengths, 8, seed=0)
    padded = sum(8 * max(lengths[i] for i in order[b]) for b in range(32))
    assert padded < 1.15 * sum(lengths)


def test_batch_size_must_be_positive():
    with pytest.raises(DataError, match="batch_size is 0, expected at least 1"):
        BatchOrder([1], 0, 0)
