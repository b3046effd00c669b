"""8-bit moments by other libraries' optimizers on the blocks, through the step hook."""

from __future__ import annotations

import pytest
import torch

import smt_ext
from models import tiny_llama, token_batch
from smt_ext import BlockPlan, LayerPlan


def plan():
    """Blocks of at least 4096 entries a module: below that the libraries keep 32-bit moments."""
    layers = {}
    for depth in range(2):
        for kind, shape in (("q_proj", (96, 96)), ("v_proj", (48, 96))):
            blocks = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2))
            layers[f"model.layers.{depth}.self_attn.{kind}"] = LayerPlan(shape, 32, blocks)
    return BlockPlan(layers)


def bitsandbytes_adamw(blocks):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(blocks, lr=5e-3, weight_decay=0.0)


def torchao_adamw(blocks):
    return pytest.importorskip("torchao.optim").AdamW8bit(blocks, lr=5e-3, weight_decay=0.0)


OPTIMIZERS = [bitsandbytes_adamw, torchao_adamw]


@pytest.fixture(autouse=True)
def _no_generated_code():
    """torchao compiles its step: the graph is traced as ever, and inductor's code is not generated."""
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        yield


def start(make):
    model = smt_ext.patch(tiny_llama(), plan())
    return model, make([m.blocks for m in smt_ext.smt_modules(model).values()])


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = model(**token_batch(step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_trains_the_blocks_and_nothing_else(make):
    model, optimizer = start(make)
    base = tiny_llama().state_dict()
    losses = train(model, optimizer, steps=6)
    assert losses[-1] < losses[1] < losses[0] * 1.01
    masks = {}
    for name, module in smt_ext.smt_modules(model).items():
        assert torch.equal(module.read_blocks(), module.blocks)
        masks[f"{name}.weight"] = module
    for key, value in base.items():
        changed = model.state_dict()[key] != value
        if key not in masks:
            assert not changed.any()
            continue
        module = masks[key]
        for row in range(-(-value.shape[0] // 32)):
            for col in range(3):
                block = changed[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32]
                assert bool(block.any()) == ((row, col) in module.layer_plan.blocks)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_moments_take_a_byte_an_entry(make):
    model, optimizer = start(make)
    train(model, optimizer, steps=1)
    entries = sum(m.blocks.numel() for m in smt_ext.smt_modules(model).values())
    seen = {}
    for param in optimizer.param_groups[0]["params"]:
        for value in optimizer.state[param].values():
            if not torch.is_tensor(value) or value.dim() == 0:
                continue
            inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else None
            for part in [value] if inner is None else [getattr(value, name) for name in inner]:
                seen[part.data_ptr()] = part.numel() * part.element_size()
    # Two moments, a scale for every 256 entries, and tables of 256 numbers.
    assert 2 * entries < sum(seen.values()) < 2.25 * entries + 4 * 4096


def through_torch_save(folder, begun, resumed):
    torch.save([part.state_dict() for part in begun], folder / "state.pt")
    for part, state in zip(resumed, torch.load(folder / "state.pt"), strict=True):
        part.load_state_dict(state)


def through_training_state(folder, begun, resumed):
    smt_ext.save_training_state(folder / "state", *begun)
    smt_ext.load_training_state(folder / "state", *resumed)


@pytest.mark.parametrize(
    ("make", "through"),
    [
        (bitsandbytes_adamw, through_torch_save),
        (bitsandbytes_adamw, through_training_state),
        (torchao_adamw, through_torch_save),
    ],
)
def test_resumes_bit_for_bit(tmp_path, make, through):
    straight = start(make)
    train(*straight, steps=4)
    begun = start(make)
    train(*begun, steps=2)
    resumed = start(make)
    through(tmp_path, begun, resumed)
    train(*resumed, steps=2, first=2)
    for name, value in straight[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name


def test_a_state_of_quantized_tensors_is_refused_with_the_way_out(tmp_path):
    model, optimizer = start(torchao_adamw)
    train(model, optimizer, steps=1)
    with pytest.raises(smt_ext.CheckpointError, match=r"exp_avg'.*OptimState8bit.*torch\.save"):
        smt_ext.save_training_state(tmp_path / "state", model, optimizer)
    assert not list(tmp_path.iterdir())
