"""Plans of whole columns and rows under the laws of training: they are lists of blocks like others."""

from __future__ import annotations

import pytest
import torch

import smt_ext
from models import mask_of, mlp
from smt_ext.memory import SavedBytes

LR = 1e-2


@pytest.mark.parametrize("unit", ["column", "row"])
def test_whole_units_train_like_masked_dense_adamw(unit):
    plan = smt_ext.make_plan(
        mlp(), budget="50% of targets", metric="random", unit=unit, block_size=16,
        allocation="dims", targets="all-linear",
    )  # fmt: skip
    assert len(plan.layers) == 3
    model = smt_ext.patch(mlp(torch.float64), plan)
    dense = mlp(torch.float64)
    before = {name: m.weight.detach().clone() for name, m in dense.named_children()}
    weights = [m.weight for m in dense.children()]
    optimizer, reference = (
        smt_ext.SparseAdamW(model, lr=LR),
        torch.optim.AdamW(weights, lr=LR, weight_decay=0.0),
    )
    for seed in range(3):
        x = torch.randn(7, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for net, step in ((model, optimizer), (dense, reference)):
            net(x).square().sum().backward()
            if net is dense:
                for name, layer in plan.layers.items():
                    dense.get_submodule(name).weight.grad *= mask_of(layer)
            step.step()
            step.zero_grad()
    for name, layer in plan.layers.items():
        trained, mask = model.get_submodule(name).weight.detach(), mask_of(layer).bool()
        assert torch.equal(trained[~mask], before[name][~mask])
        assert not torch.equal(trained[mask], before[name][mask])
        torch.testing.assert_close(trained, dense.get_submodule(name).weight, rtol=1e-9, atol=1e-12)


def test_columns_keep_their_own_inputs_only():
    saved = {}
    for count in (1, 2):
        plan = smt_ext.make_plan(
            mlp(), budget=f"{4 * count} blocks", metric="random", unit="column", block_size=16,
            targets="down_proj",
        )  # fmt: skip
        model = smt_ext.patch(mlp(torch.float64), plan)
        with SavedBytes(model) as found:
            out = model(torch.randn(7, 96, dtype=torch.float64))
        assert out.requires_grad
        saved[count] = found.bytes
    # (T, L) float64 more for one more column, whatever its 50 rows.
    assert saved[2] - saved[1] == 7 * 16 * 8
