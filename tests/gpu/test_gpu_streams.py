"""The operators work on torch's current stream and on the device of their tensors.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import smt_ext
from models import mlp, mlp_plan
from reference import DTYPES, sample

NAMES = list(sample(torch.float32))
CYCLES = 200_000_000  # about 0.1 s: a kernel on another stream would long have run


def outcome(operator: Any, arguments: Any) -> list[torch.Tensor]:
    """What the operator returns, and its arguments afterwards."""
    out = operator(*arguments)
    leaves, _ = tree_flatten((out, arguments))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def clone(arguments: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_stream_that_is_not_the_default_one(name: str, cuda: torch.device) -> None:
    operator, arguments = sample(torch.float32, "cuda")[name]
    expected = [tensor.clone() for tensor in outcome(operator, clone(arguments))]
    leaves, structure = tree_flatten(arguments)
    floats = [i for i, leaf in enumerate(leaves)
              if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]  # fmt: skip
    late = [torch.full_like(leaves[i], 1e3) for i in floats]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # The operands come late on this stream; a kernel on any other would find 1000 in them.
        torch.cuda._sleep(CYCLES)
        for i, target in zip(floats, late, strict=True):
            target.copy_(leaves[i])
            leaves[i] = target
        got = outcome(operator, tree_unflatten(leaves, structure))
    stream.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_that_is_not_the_current_one(
    name: str, dtype: torch.dtype, second_cuda: torch.device
) -> None:
    operator, arguments = sample(dtype, "cuda:0")[name]
    expected = outcome(operator, clone(arguments))
    moved = tree_map_only(torch.Tensor, lambda t: t.to(second_cuda), arguments)
    assert torch.cuda.current_device() == 0
    for one, other in zip(outcome(operator, moved), expected, strict=True):
        assert one.device == second_cuda
        assert torch.equal(one.to(other.device), other)
    assert torch.cuda.current_device() == 0


def test_a_model_on_two_devices_trains_like_one_on_one(
    cuda: torch.device, second_cuda: torch.device
) -> None:
    def train(split: bool) -> list[torch.Tensor]:
        model = mlp(torch.float64).to(cuda)
        if split:
            model.down_proj.to(second_cuda)
            model.down_proj.register_forward_pre_hook(lambda m, args: (args[0].to(second_cuda),))
        smt_ext.patch(model, mlp_plan())
        optimizer = smt_ext.SparseAdamW(model, lr=1e-2, max_grad_norm=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(6, 96, generator=generator, dtype=torch.float64)
            model(x.to(cuda)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [module.weight.cpu() for module in smt_ext.smt_modules(model).values()]

    for one, two in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-14)
