"""Training on a GPU beside the same training on the CPU. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference
import smt_ext
from models import (
    MLP,
    MLP_LAYERS,
    blocks_of,
    llama_plan,
    mask_of,
    mlp,
    mlp_plan,
    tiny_llama,
    token_batch,
)
from smt_ext import BlockPlan, LayerPlan, ops
from smt_ext.nn.tiles import tiles_of

HYPER = {
    "lr": 1e-2,
    "betas": (0.8, 0.95),
    "eps": 1e-7,
    "weight_decay": 0.1,
    "decay_to": "base",
    "max_grad_norm": 0.1,
}
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def patched_mlp(device: torch.device | str, dtype: torch.dtype = torch.float32) -> MLP:
    model = mlp(dtype).to(device)
    smt_ext.patch(model, mlp_plan())
    return model


def rows(seed: int, dtype: torch.dtype = torch.float32, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 96, generator=generator, dtype=torch.float64).to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, module in smt_ext.smt_modules(model).items():
        assert module.blocks.grad is not None
        grads[name] = module.blocks.grad
    return grads


def train_mlp(device: torch.device | str, dtype: torch.dtype, steps: int = 5) -> MLP:
    model = patched_mlp(device, dtype)
    optimizer = smt_ext.SparseAdamW(model, **HYPER)
    for step in range(steps):
        model(rows(step, dtype).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0
    return model


def test_float64_training_is_that_of_the_cpu(cuda: torch.device) -> None:
    on_cpu, on_gpu = train_mlp("cpu", torch.float64), train_mlp(cuda, torch.float64)
    start = mlp(torch.float64)
    for name in MLP_LAYERS:
        expected = on_cpu.get_submodule(name).weight
        assert (expected - start.get_submodule(name).weight).abs().max() > 1e-3
        got = on_gpu.get_submodule(name).weight.cpu()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_training_stays_with_the_cpu(dtype: torch.dtype, cuda: torch.device) -> None:
    on_cpu, on_gpu = train_mlp("cpu", dtype), train_mlp(cuda, dtype)
    for name in MLP_LAYERS:
        error = on_gpu.get_submodule(name).weight.cpu().double()
        error = (error - on_cpu.get_submodule(name).weight.double()).abs()
        # As in tests/core/test_optim.py: an entry whose gradient is near zero may go the other way.
        assert error.max() <= 2 * 5 * HYPER["lr"]
        budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]
        assert error.mean() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_training_gives_the_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    one, other = train_mlp(cuda, dtype), train_mlp(cuda, dtype)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_learns_as_on_the_cpu(dtype: torch.dtype, cuda: torch.device) -> None:
    losses = []
    for device in (torch.device("cpu"), cuda):
        model = tiny_llama(dtype).to(device)
        plan = llama_plan(model, KINDS)
        smt_ext.patch(model, plan)
        before = tiny_llama(dtype).state_dict()
        optimizer = smt_ext.SparseAdamW(model, lr=5e-3)
        batch = {name: value.to(device) for name, value in token_batch().items()}
        losses.append([])
        for _ in range(12):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        for name, layer in plan.layers.items():
            weight, mask = model.get_submodule(name).weight.cpu(), mask_of(layer)
            assert torch.equal(weight[~mask], before[f"{name}.weight"][~mask])
            assert not torch.equal(weight[mask], before[f"{name}.weight"][mask])
    on_cpu, on_gpu = losses
    assert on_cpu[-1] < on_cpu[0] - 0.1
    # The first loss to the rounding of a forward pass; what rounding does to Adam's steps grows.
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=max(1e-5, torch.finfo(dtype).eps))
    assert on_gpu[-1] == pytest.approx(on_cpu[-1], rel=0.05)


def test_autocast_computes_and_saves_in_its_dtype(cuda: torch.device) -> None:
    model, dense = patched_mlp(cuda), mlp().to(cuda)
    x = rows(0, count=9).to(cuda)
    with torch.autocast("cuda", torch.bfloat16):
        y, y_dense = model(x), dense(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_dense)
    y.float().square().sum().backward()
    y_dense.float().square().sum().backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        native = blocks_of(dense.get_submodule(name).weight.grad, MLP_LAYERS[name])
        assert native.abs().max() > 1
        torch.testing.assert_close(grad, native, rtol=2e-2, atol=2e-2 * native.abs().max().item())


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler_with_float16(overflow: bool, cuda: torch.device) -> None:
    scaled, plain = patched_mlp(cuda), patched_mlp(cuda)
    optimizers = [smt_ext.SparseAdamW(m, lr=1e-2, max_grad_norm=0.1) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    x = rows(0).to(cuda)

    def loss_of(model: nn.Module) -> Tensor:
        with torch.autocast("cuda", torch.float16):
            out: Tensor = model(x)
        return out.float().square().mean()

    scaler.scale(loss_of(scaled) * (float("inf") if overflow else 1.0)).backward()
    scaler.step(optimizers[0])
    scaler.update()
    if overflow:
        assert optimizers[0].skipped_steps == 1
        assert scaler.get_scale() == 2.0**9
        assert torch.equal(scaled.up_proj.weight.cpu(), mlp().up_proj.weight)
        return
    loss_of(plain).backward()
    optimizers[1].step()
    assert optimizers[0].last_grad_norm == pytest.approx(optimizers[1].last_grad_norm, rel=1e-2)
    assert not torch.equal(scaled.up_proj.weight.cpu(), mlp().up_proj.weight)
    assert (scaled.up_proj.weight - plain.up_proj.weight).abs().mean() <= 1e-3


def test_tf32_products_where_torch_allows_them(cuda: torch.device) -> None:
    dy, x = torch.randn(300, 128, device=cuda), torch.randn(300, 128, device=cuda)
    zero = torch.zeros(1, dtype=torch.int32, device=cuda)
    exact = dy.double().T @ x.double()
    magnitude = dy.double().abs().T @ x.double().abs()
    full = ops.block_grad(dy, x, zero, zero, 128)[0]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = ops.block_grad(dy, x, zero, zero, 128)[0]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    sums = 2 * 302 * 2**-23
    assert ((full - exact).abs() <= sums * magnitude).all()
    # tf32 keeps 11 bits of each operand.
    assert ((rounded - exact).abs() <= (sums + 2.01 * 2**-11) * magnitude).all()
    assert (rounded - exact).norm() > 10 * (full - exact).norm()


def test_gradients_accumulate_in_place(cuda: torch.device) -> None:
    fused, plain = patched_mlp(cuda, torch.float64), patched_mlp(cuda, torch.float64)
    for module in smt_ext.smt_modules(fused).values():
        module.accumulate_in_place = True
    for model in (fused, plain):
        for seed in range(3):
            model(rows(seed, torch.float64).to(cuda)).square().sum().backward()
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(fused)[name], grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_bits(reentrant: bool, cuda: torch.device) -> None:
    plain, saving = patched_mlp(cuda), patched_mlp(cuda)
    x = rows(0).to(cuda).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(saving, x, use_reentrant=reentrant).square().sum().backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(saving)[name], grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str, cuda: torch.device) -> None:
    torch._dynamo.reset()
    eager, compiled = patched_mlp(cuda), patched_mlp(cuda)
    run: Callable[[Tensor], Tensor] = torch.compile(compiled, fullgraph=True, backend=backend)
    x = rows(0).to(cuda)
    eager(x).square().sum().backward()
    run(x).square().sum().backward()
    for name, grad in gradients(eager).items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(gradients(compiled)[name], grad, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_never_waits_for_the_gpu(scaled: bool, cuda: torch.device) -> None:
    model = patched_mlp(cuda)
    optimizer = smt_ext.SparseAdamW(model, **HYPER)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    x = rows(0).to(cuda)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 0


def test_original_weights_and_unpatching_are_exact(cuda: torch.device) -> None:
    model, base = train_mlp(cuda, torch.bfloat16), mlp(torch.bfloat16).to(cuda)
    x = rows(9, torch.bfloat16).to(cuda)
    trained = model(x)
    assert not torch.equal(trained, base(x))
    with smt_ext.original_weights(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), trained)
    smt_ext.unpatch(model, restore=True)
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_patched_model_moves_between_devices(cuda: torch.device) -> None:
    model = patched_mlp("cpu").to(cuda)
    model(rows(0).to(cuda)).square().sum().backward()
    twin = patched_mlp("cpu")
    twin(rows(0)).square().sum().backward()
    for name, grad in gradients(twin).items():
        got = gradients(model)[name].cpu()
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())
    model.zero_grad()
    model.cpu()(rows(0)).square().sum().backward()
    for name, grad in gradients(twin).items():
        assert torch.equal(gradients(model)[name], grad)


def test_a_saved_run_goes_on_bit_for_bit(cuda: torch.device, tmp_path) -> None:
    def fresh() -> tuple[MLP, smt_ext.SparseAdamW]:
        model = patched_mlp(cuda, torch.bfloat16)
        return model, smt_ext.SparseAdamW(model, **HYPER)

    def step(model: MLP, optimizer: smt_ext.SparseAdamW, seed: int) -> None:
        model(rows(seed, torch.bfloat16).to(cuda)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight, optimizer = fresh()
    for seed in range(2):
        step(straight, optimizer, seed)
    smt_ext.save_training_state(tmp_path / "state", straight, optimizer, step=2)
    noise = torch.rand(4, device=cuda)
    resumed, second = fresh()
    assert smt_ext.load_training_state(tmp_path / "state", resumed, second)["step"] == 2
    assert torch.equal(torch.rand(4, device=cuda), noise)  # dropout goes on, too
    for model, opt in ((straight, optimizer), (resumed, second)):
        step(model, opt, 2)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize(("size", "columns"), [(64, 64), (32, 64), (32, 32), (16, 32), (64, 128)])
@pytest.mark.parametrize("tokens", [512, 8192])
def test_whole_block_columns_are_exact(
    cuda: torch.device, size: int, columns: int, tokens: int
) -> None:
    """By tall tiles where there are tokens enough; sums of small integers round nowhere."""
    torch.manual_seed(0)
    n = 8192 - 8  # a ragged edge
    dy = torch.randint(-2, 3, (tokens, n), device=cuda).bfloat16()
    x = torch.randint(-2, 3, (tokens, columns), device=cuda).bfloat16()
    places = [(row, slot) for row in range(8192 // size) for slot in range(columns // size)]
    del places[5]
    rows, slots = [row for row, _ in places], [slot for _, slot in places]
    tiles, lone = tiles_of(rows, slots, size)
    assert tiles is not None
    assert lone is not None
    index = [torch.tensor(part, dtype=torch.int32, device=cuda) for part in (rows, slots)]
    given = (dy, x, *index, size)
    together = {"tiles": tiles.to(cuda), "lone": lone.to(cuda)}
    want = reference.gather_blocks(dy.double().T @ x.double(), rows, slots, size)
    got = ops.block_grad(*given, torch.float32, **together)
    assert torch.equal(got, want.float())
    ops.block_grad_acc_(got, *given, **together)
    assert torch.equal(got, 2 * want.float())


@pytest.mark.parametrize("size", [32, 128])
def test_siblings_compute_their_gradients_by_one_launch(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Sums of small integers round nowhere: those of q, k and v are exact, whoever is called."""
    monkeypatch.setattr("smt_ext.nn.modules._LEAST_PRODUCTS", 1)
    widths = {"q_proj": 1024, "k_proj": 256, "v_proj": 256 - 8}
    layers = {
        name: LayerPlan(
            shape=(width, 512),
            block_size=size,
            blocks=tuple((row, col) for row in range(-(-width // size)) for col in (0, 3)),
        )
        for name, width in widths.items()
    }
    for called in (list(widths), ["q_proj", "v_proj"]):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(512, width) for name, width in widths.items()})
        smt_ext.patch(model.to(cuda, torch.bfloat16), BlockPlan(layers=layers))
        x = torch.randint(-2, 3, (2048, 512), device=cuda).bfloat16()
        outputs = {name: model[name](x) for name in called}
        nodes = {
            edge
            for y in outputs.values()
            for edge, _ in y.grad_fn.next_functions
            if edge and hasattr(edge, "launch")
        }
        assert len(nodes) == 1
        dys = [torch.randint(-2, 3, y.shape, device=cuda).bfloat16() for y in outputs.values()]
        torch.autograd.backward(list(outputs.values()), dys)
        for name, dy in zip(called, dys, strict=True):
            rows, cols = zip(*layers[name].blocks, strict=True)
            want = reference.gather_blocks(dy.double().T @ x.double(), rows, cols, size)
            assert torch.equal(model[name].blocks.grad, want.float())
        assert all(model[name].blocks.grad is None for name in widths.keys() - set(called))


def test_tiles_are_found_wherever_the_model_was_patched(cuda: torch.device) -> None:
    """Two whole block columns: at once on the GPU, or when the model moves there."""
    blocks = tuple((row, col) for row in range(6) for col in (1, 4))
    plan = BlockPlan(layers={"0": LayerPlan(shape=(96, 128), block_size=16, blocks=blocks)})
    tiles = []
    for devices in ((cuda, None), (torch.device("cpu"), cuda)):
        model = nn.Sequential(nn.Linear(128, 96)).to(devices[0])
        smt_ext.patch(model, plan)
        if devices[1] is not None:
            model.to(devices[1])
        (module,) = smt_ext.smt_modules(model).values()
        assert module._block_tiles is not None
        assert module._block_tiles.is_cuda
        tiles.append(module._block_tiles)
    assert torch.equal(*tiles)
