"""AdamW over selected blocks: one call updates blocks, moments and weights of all layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from .. import ops
from ..distributed import sharding
from ..nn.modules import BlocksParameter, SMTLayer, live_modules, within_range
from ..nn.patching import ACTIVE_BLOCKS, ids_beside, parameters_beside, plan_of, smt_modules
from .learning_rate import auto_factor, auto_learning_rate, explain_learning_rate, rate_beside
from .offload import HostBlocks, Offload

__all__ = ["SparseAdamW"]

logger = logging.getLogger("smt_ext")

_STATE_TENSORS = ("exp_avg", "exp_avg_sq", "master")
# What a copy takes over beside torch's own.
_SETTINGS = ("master_dtype", "max_grad_norm", "stochastic_rounding", "seed", "_last_grad_norm",
             "_skipped")  # fmt: skip
_HALF = (torch.bfloat16, torch.float16)
_DECAYS_TO = ("zero", "base")
_LARGEST_GRADIENT = 2.0**63  # as in the kernel: its square is finite in float32


@dataclass(frozen=True)
class _Operands:
    """What the kernel reads and writes of one layer.

    Attributes:
        state: step, moments (S, L, L) and, if any, master values of the blocks.
        weight: (N, K), or what stands for it, with block s at (rows[s], cols[s]).
        blocks, grad: (S, L, L). origin: what the decay pulls the blocks to; None for zero.
        rows, cols: (S,) int32, in blocks.
    """

    state: dict[str, Any]
    weight: Tensor
    blocks: Tensor
    grad: Tensor
    rows: Tensor
    cols: Tensor
    origin: Tensor | None


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) for SMT blocks, fused with the write into the weights.

    The formula and the order of operations are those of ``torch.optim.AdamW``; state exists for
    the selected blocks only (SMT paper, section 3.2): two moments of S x L x L entries a layer,
    in float32 (float64 for float64 blocks). A step whose gradients hold an inf or NaN, or whose
    learning rate is none that can be computed with, writes nothing, and is counted in
    :attr:`skipped_steps`. A finite gradient larger
    than 2^63 (2^511 for float64 blocks) counts as that, so that no square overflows; a float16 weight
    saturates. No host synchronisation. Under ``fully_shard``
    each rank updates, and keeps the state of, the blocks that it owns.

    Parameters that train whole beside the blocks (``make_plan(also_train=...)``, or
    :func:`smt_ext.train_also`) are a second parameter group, without weight decay, which
    torch's own fused AdamW updates: in float32, those in half precision from master values.

    On CUDA a step may be captured into a CUDA graph, once every parameter has taken a step: state
    must exist before. A graph follows gradients, step count, GradScaler and a learning rate that is a
    CUDA tensor; numbers (a float ``lr``, ``betas``, ...) stay as they were at capture, and so does
    which parameters have gradients. Capture anew after :meth:`load_state_dict`.

    Args:
        params: a patched model, or blocks parameters of one (an iterable of parameters or of
            parameter groups, as for any torch optimizer).
        lr: learning rate, a float or a 0-dim tensor, or ``"auto"``: from the plan's own loss and
            gradients, see :func:`smt_ext.optim.learning_rate.auto_learning_rate`; the logger
            ``smt_ext`` says which, and why. ``"2x auto"`` is twice that. SMT wants 10 to 40 times the
            learning rate of full fine-tuning.
        also_lr: learning rate of what trains beside the blocks. Default: as many times ``lr`` as the
            automatic rates of the two are apart, see
            :func:`smt_ext.optim.learning_rate.rate_beside`.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; decay is decoupled.
        decay_to: where ``weight_decay`` pulls the blocks: to ``"zero"``, as torch does, or to their
            values before training, ``"base"`` (L2-SP; Li, Grandvalet and Davoine, ICML 2018). A rate of
            0.01 and a decay of 1 take back a hundredth of the change in a step. On another device than
            the CPU those values take the bytes of the blocks in the weight's dtype.
        master_dtype: torch.float32 keeps float32 master values in the optimizer for
            half-precision blocks. Not needed for the default float32 blocks of
            :func:`smt_ext.patch`, which are the master values themselves.
        max_grad_norm: clip the global L2 norm of all block gradients, on the device.
        stochastic_rounding: round bfloat16 blocks without master stochastically, reproducibly from
            ``seed`` and the step; float16 ones are rounded to nearest all the same.
        seed: of the stochastic rounding.
        offload: "cpu" keeps moments and master values in CPU memory and updates there (see
            :mod:`smt_ext.optim.offload`); a step then waits for the gradients. What stays on the GPU is
            least for ``patch(..., block_dtype=torch.bfloat16)`` with ``master_dtype=torch.float32``.
            Changes nothing for a model on the CPU. Not for CUDA graphs. Not yet run on a GPU.
        process_group: of ranks with replicas of the model (DistributedDataParallel), which then skip
            the same steps, also where an inf or NaN appears on one of them after gradients were
            reduced: an all-reduce of one number a step, and all of them take every step. Replicas of
            shards under ``fully_shard`` agree without.

    Raises:
        ValueError: a bad hyper-parameter, or parameters that are no SMT blocks.
        PlanError: ``lr`` is automatic, and the plan was made without gradients.
        PatchError: the model is sharded in a way that its blocks cannot follow; without this
            optimizer, or where the model is sharded later, the first step raises it.
    """

    # torch.amp.GradScaler then hands over its scale and inf flag instead of syncing the host.
    _step_supports_amp_scaling = True
    _smt_writes_weights = True  # see smt_ext.nn.step_hooks

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor | str = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay_to: Literal["zero", "base"] = "zero",
        also_lr: float | Tensor | None = None,
        master_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        offload: Literal["cpu"] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(lr, str):
            lr = _auto_rate(lr, params)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                    "decay_to": decay_to}  # fmt: skip
        _check_group(defaults)
        _check_settings(max_grad_norm, master_dtype, seed)
        if offload not in (None, "cpu"):
            raise ValueError(f"offload is {offload!r}, expected 'cpu' or None.")
        if isinstance(params, nn.Module):
            params = _groups_of(params, lr, also_lr)
        elif also_lr is not None:
            raise ValueError("also_lr is for a model; give parameter groups rates of their own.")
        self.master_dtype = master_dtype
        self.max_grad_norm = max_grad_norm
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._offload = None if offload is None else Offload()
        self._process_group = process_group
        self._last_grad_norm: Tensor | None = None
        self._skipped: Tensor | None = None
        self._start_afresh()
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)
        owners = self._modules_by_blocks()
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in owners:
                    owners[id(param)].check_shards()

    def _start_afresh(self) -> None:
        # By id of the parameter, which the groups hold: on a device, what the decay pulls it to; with a
        # master value, its version after the last step.
        self._base_values: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise ValueError(
                "SparseAdamW(process_group=...) cannot be copied or pickled: a process group belongs to "
                "its process. Build one for the copied model and give it optimizer.state_dict()."
            )
        own = {name: getattr(self, name) for name in _SETTINGS}
        offload = None if self._offload is None else Offload()  # without its buffers
        return {**super().__getstate__(), **own, "_offload": offload, "_process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_afresh()

    @property
    def last_grad_norm(self) -> float:
        """L2 norm of all gradients in the last step, before clipping (synchronises)."""
        return math.nan if self._last_grad_norm is None else float(self._last_grad_norm)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a gradient or rate that is inf or NaN (synchronises)."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every block that has a gradient, its moments and its weight.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.

        Returns:
            what ``closure`` returned, or None.

        Raises:
            PatchError: inside :func:`smt_ext.original_weights`.
            ValueError: the model has been unpatched, or its blocks were replaced.
            ValueError: betas, eps or weight_decay of a parameter group are no numbers to compute
                with; nothing has changed.
            RuntimeError: a CUDA graph is being captured, and a parameter has not taken a step yet or
                other parameters have gradients than before.
        """
        for group in self.param_groups:
            _check_group(group, rate_may_be_bad=True)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owners = self._modules_by_blocks()
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not with_grad:
            if self._process_group is not None:
                first = self.param_groups[0]["params"][0]
                self._agree(torch.zeros((), dtype=torch.float64, device=first.device), [])
            return loss
        for param in with_grad:
            if id(param) in owners:
                owners[id(param)].check_trained()

        self._follow(with_grad)
        grad_scale, found_inf = self._scale_and_guard([p.grad for p in with_grad])
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for same_step in self._by_step(params, found_inf):
                for alike in self._by_master(same_step):
                    self._update(group, alike, owners, grad_scale, found_inf)
        for param in with_grad:
            if "master" in self.state[param]:
                self._seen[id(param)] = _version(param)
        return loss

    def _follow(self, params: list[nn.Parameter]) -> None:
        """Let master values be what others have written into their parameters since the last step."""
        for param in params:
            master = self.state[param].get("master")
            # Of blocks each write is known; of others, writes into .data are not.
            known = isinstance(param, BlocksParameter) and self._seen.get(id(param)) == _version(
                param
            )
            if master is None or known:
                continue
            held, value = sharding.local(master), sharding.local(param.detach()).to(master.device)
            rounded = within_range(held, value.dtype).to(value.dtype)
            held.copy_(torch.where(rounded == value, held, value.to(held.dtype)))

    def _scale_and_guard(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Factor for every gradient (unscaling times clipping) and the inf/NaN flag; float64."""
        norm = sharding.global_grad_norm(grads)
        # The two attributes are GradScaler's; it deletes them after the step.
        scaler_scale: Tensor | None = getattr(self, "grad_scale", None)
        scaler_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale = torch.ones_like(norm)
        if scaler_scale is not None:
            grad_scale = 1.0 / scaler_scale.to(norm)
            norm = norm * grad_scale
        found_inf = (~torch.isfinite(norm)).to(norm.dtype)
        if scaler_inf is not None:
            found_inf = torch.maximum(found_inf, scaler_inf.to(norm))
        for group in self.param_groups:
            found_inf = torch.maximum(found_inf, _unusable_rate(group, norm))
        self._agree(found_inf, grads)
        if self.max_grad_norm is not None:
            # The formula of torch.nn.utils.clip_grad_norm_.
            grad_scale = grad_scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self._last_grad_norm = norm
        if self._skipped is None:
            _refuse_capture(grads[0].device)
            self._skipped = torch.zeros_like(found_inf)
        self._skipped += found_inf.to(self._skipped.device)  # in place: a captured graph counts too
        return grad_scale, found_inf

    def _agree(self, found_inf: Tensor, grads: list[Tensor]) -> None:
        """Not 0 where it is not 0 on any rank that holds the same blocks."""
        groups = sharding.replica_groups(grads)
        if self._process_group is not None:
            groups.append(self._process_group)
        for group in groups:
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=group)

    def _by_step(self, params: list[nn.Parameter], found_inf: Tensor) -> list[list[nn.Parameter]]:
        """Lists of parameters that have seen the same steps, their counter advanced by this one.

        Parameters share one counter tensor until some miss a gradient (experts without tokens,
        say): then those that go on get a counter of their own.
        """
        started: dict[tuple[torch.device, torch.device], Tensor] = {}
        sharing: dict[int, list[nn.Parameter]] = {}
        for param in params:
            if not self.state[param]:
                _refuse_capture(param.device)
                device = self._state_device(param)
                zero = torch.zeros((), dtype=torch.float64, device=device)
                self._start(param, started.setdefault((param.device, device), zero))
            sharing.setdefault(id(self.state[param]["step"]), []).append(param)
        for step_id, members in sharing.items():
            step: Tensor = self.state[members[0]]["step"]
            users = sum(id(state.get("step")) == step_id for state in self.state.values())
            if users > len(members):
                _refuse_capture(step.device)
                step = step.clone()
                for param in members:
                    self.state[param]["step"] = step
            step += 1.0 - found_inf.to(step.device)
        return list(sharing.values())

    def _by_master(self, params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Lists of parameters all of which have a master value, or none: what one call takes."""
        split: dict[bool, list[nn.Parameter]] = {}
        for param in params:
            split.setdefault("master" in self.state[param], []).append(param)
        return list(split.values())

    def _start(self, param: nn.Parameter, step: Tensor) -> None:
        beside = id(param) in self._beside
        if self._offload is not None and sharding.is_sharded(param):
            raise ValueError(
                "offload='cpu' does not go with fully_shard, which has its own: "
                "fully_shard(model, offload_policy=CPUOffloadPolicy())."
            )
        moment = torch.float64 if param.dtype == torch.float64 else torch.float32
        state = self.state[param]
        state["step"] = step
        device = self._state_device(param)
        state["exp_avg"] = torch.zeros_like(param, dtype=moment, device=device)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=moment, device=device)
        if param.dtype in _HALF and (beside or self.master_dtype is not None):
            state["master"] = param.detach().to(device, torch.float32)

    def _state_device(self, param: nn.Parameter) -> torch.device:
        on_host = self._offload is not None and id(param) not in self._beside
        return torch.device("cpu") if on_host else param.device

    def _update(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        owners: dict[int, SMTLayer],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        if beside := [p for p in params if id(p) not in owners]:
            self._update_beside(group, beside, grad_scale, found_inf)
            params = [p for p in params if id(p) in owners]
        sharded: list[nn.Parameter] = [p for p in params if sharding.is_sharded(p)]
        whole = [p for p in params if not sharding.is_sharded(p)]
        if whole:
            modules = [owners[id(p)] for p in whole]
            update = self._update_whole
            if self._offload is not None and _is_elsewhere(whole[0]):
                update = self._update_offloaded
            update(group, whole, modules, grad_scale, found_inf)
        if sharded:
            modules = [owners[id(p)] for p in sharded]
            self._update_sharded(group, sharded, modules, grad_scale, found_inf)

    def _update_beside(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Parameters that train whole; of sharded ones this rank's part."""
        held = [p for p in params if sharding.local(p).numel()]
        if not held:
            return
        states = [self.state[p] for p in held]
        values = [
            sharding.local(s["master"] if "master" in s else p.detach())
            for p, s in zip(held, states, strict=True)
        ]
        grads = [
            sharding.local(p.grad)
            .to(v.dtype, copy=True)
            .clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
            for p, v in zip(held, values, strict=True)
            if p.grad is not None
        ]
        beta1, beta2 = group["betas"]
        device = values[0].device
        adamw(
            values,
            grads,
            [sharding.local(s["exp_avg"]) for s in states],
            [sharding.local(s["exp_avg_sq"]) for s in states],
            [],
            # The step has been counted; torch counts it too.
            [
                s["step"].to(v.device, torch.float32) - 1.0
                for s, v in zip(states, values, strict=True)
            ],
            fused=True,
            grad_scale=grad_scale.reciprocal().to(device, torch.float32),
            found_inf=found_inf.to(device, torch.float32),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=_scalar(group["lr"], device).float(),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for param, value in zip(held, values, strict=True):
            if param.dtype != value.dtype:
                sharding.local(param.detach()).copy_(within_range(value, param.dtype))

    def _update_whole(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        modules: list[SMTLayer],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        for module in modules:
            module.write_changed_blocks_()  # should the step be skipped, nothing else would
        operands = [
            _Operands(self.state[p], m.fused_weight(), p.detach(), _grad_of(p), m.block_rows,
                      m.block_cols, self._origin(group, p, m))
            for p, m in zip(params, modules, strict=True)
        ]  # fmt: skip
        self._call(group, params[0], operands, grad_scale, found_inf)
        for module in modules:
            module.note_written()

    def _update_offloaded(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        modules: list[SMTLayer],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        assert self._offload is not None
        grad_scale, found_inf = grad_scale.cpu(), found_inf.cpu()
        if found_inf:
            return

        def kernel(places: Sequence[int], host: Sequence[HostBlocks]) -> None:
            operands = [
                _Operands(self.state[params[i]], h.weight, h.blocks, h.grad, h.rows, h.cols,
                          self._origin(group, h.blocks, modules[i]))
                for i, h in zip(places, host, strict=True)
            ]  # fmt: skip
            self._call(group, params[places[0]], operands, grad_scale, found_inf)

        self._offload.update(
            params,
            modules,
            kernel,
            reads_blocks=any("master" not in self.state[p] for p in params),
            # The numbers that it draws depend on a layer's place among those of the call.
            one_call=self.stochastic_rounding,
        )

    def _update_sharded(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        modules: list[SMTLayer],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Update the blocks that this rank owns; then all ranks write all blocks into their rows."""
        # What the weights are to hold of this rank's blocks. To the kernel it is a weight, of one
        # block over the other.
        images = [
            within_range(sharding.local(p.detach()), m.weight.dtype).to(m.weight.dtype, copy=True)
            for p, m in zip(params, modules, strict=True)
        ]
        operands = []
        for param, module, image in zip(params, modules, images, strict=True):
            if not image.numel():
                continue
            rows = torch.arange(len(image), dtype=torch.int32, device=image.device)
            operands.append(
                _Operands(self.state[param], image.flatten(0, 1), sharding.local(param.detach()),
                          sharding.local(_grad_of(param)), rows, torch.zeros_like(rows),
                          self._origin(group, param, module))
            )  # fmt: skip
        if operands:
            self._call(group, params[0], operands, grad_scale, found_inf)
        for module, blocks in zip(modules, sharding.full_each(params, images), strict=True):
            module.write_blocks_(blocks)
            module.note_written()

    def _call(
        self,
        group: dict[str, Any],
        param: nn.Parameter,
        operands: list[_Operands],
        grad_scale: Tensor,
        found_inf: Tensor,
    ) -> None:
        """One launch for layers that are alike; ``param`` is one of theirs."""
        step: Tensor = operands[0].state["step"]
        beta1, beta2 = group["betas"]
        # Shards round with numbers of their own, replicas of a shard with the same.
        seed = self.seed + sharding.shard_rank(param) if self.stochastic_rounding else -1
        ops.sparse_adamw_step_(
            [o.weight for o in operands],
            [o.blocks for o in operands],
            [o.grad for o in operands],
            [sharding.local(o.state["exp_avg"]) for o in operands],
            [sharding.local(o.state["exp_avg_sq"]) for o in operands],
            [sharding.local(o.state["master"]) for o in operands if "master" in o.state],
            [o.rows for o in operands],
            [o.cols for o in operands],
            step,
            _scalar(group["lr"], step.device),
            grad_scale.to(step.device),
            found_inf.to(step.device),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            seed,
            [o.origin for o in operands if o.origin is not None],
        )

    def _origin(self, group: dict[str, Any], blocks: Tensor, module: SMTLayer) -> Tensor | None:
        """What the decay pulls the blocks to, on their device, cut as they are; None for zero."""
        if group.get("decay_to") != "base" or not group["weight_decay"]:
            return None
        return self._base_value(blocks, module)

    def _base_value(self, blocks: Tensor, module: SMTLayer) -> Tensor:
        value = module.original_blocks
        if value.dtype == torch.float64:
            value = value.to(blocks.dtype)
        if blocks.device == value.device:
            return sharding.shard_of(value, blocks)
        held = self._base_values.get(id(blocks))
        if held is None or held.device != blocks.device:
            held = sharding.shard_of(value, blocks).to(blocks.device)
            self._base_values[id(blocks)] = held
        return held

    def state_dict(self) -> dict[str, Any]:
        """As in torch, plus ``skipped_steps``."""
        return {**super().state_dict(), "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, bit for bit.

        Raises:
            ValueError: other parameter groups, or moments of another shape.
        """
        # torch casts floating-point state to the parameter's dtype and device, which would round the
        # float32 moments of half-precision blocks, and need the room there that offloading saves.
        super().load_state_dict(
            {
                **state_dict,
                "state": {
                    i: {k: v for k, v in state.items() if k not in _STATE_TENSORS}
                    for i, state in state_dict["state"].items()
                },
            }
        )
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        steps: dict[tuple[torch.device, torch.device, float], Tensor] = {}
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved is None:
                continue
            state = self.state[param]
            for name in _STATE_TENSORS:
                if name not in saved:
                    continue
                value = saved[name]
                if value.shape != param.shape:
                    raise ValueError(
                        f"optimizer state {name!r} of parameter {saved_id} has shape "
                        f"{tuple(value.shape)}, expected {tuple(param.shape)}: it was saved "
                        "for another plan."
                    )
                if sharding.is_sharded(value):
                    state[name] = value.to(param.device, copy=True)
                else:
                    part = sharding.shard_of(value, param).to(self._state_device(param), copy=True)
                    state[name] = sharding.like(part, param)
            step = torch.as_tensor(saved["step"], dtype=torch.float64)
            device = self._state_device(param)
            state["step"] = steps.setdefault(
                (param.device, device, float(step)), step.to(device, copy=True)
            )
        skipped = float(state_dict.get("skipped_steps", 0))
        self._skipped = _scalar(skipped, params[0].device)

    def _modules_by_blocks(self) -> dict[int, SMTLayer]:
        """The layer that owns each blocks parameter, by ``id``; ``_beside`` are all other known ones."""
        owners = {id(module.blocks): module for module in live_modules()}
        self._beside = ids_beside(live_modules())
        for group in self.param_groups:
            whole = [p for p in group["params"] if id(p) not in owners]
            if whole and group.get("decay_to") == "base" and group["weight_decay"]:
                raise ValueError(
                    "decay_to='base' is for blocks, and its parameter group holds others too (first: "
                    f"shape {tuple(whole[0].shape)}). Put them into a group of their own, with "
                    "weight_decay=0 or decay_to='zero'."
                )
        foreign = [
            param
            for group in self.param_groups
            for param in group["params"]
            if id(param) not in owners and id(param) not in self._beside
        ]
        if foreign:
            raise ValueError(
                f"SparseAdamW updates the blocks of patched layers, but {len(foreign)} of its "
                f"parameters are none (first: shape {tuple(foreign[0].shape)}). Call "
                "smt_ext.patch(model, plan) before building the optimizer and pass the model or "
                "its blocks; train other parameters with a second optimizer, such as "
                "torch.optim.AdamW; build a new optimizer after unpatching or replacing blocks."
            )
        return owners


def _version(param: nn.Parameter) -> int:
    """Grows whenever anyone writes into a parameter."""
    return sharding.local(param.detach())._version + getattr(param, "handed_out", 0)


def _grad_of(param: nn.Parameter) -> Tensor:
    assert param.grad is not None  # step() leaves the others out
    return param.grad


def _groups_of(
    model: nn.Module, lr: float | Tensor, also_lr: float | Tensor | None
) -> list[dict[str, Any]]:
    """The blocks, and what the plan trains beside them with a rate of its own, without decay."""
    blocks = _blocks_of(model)
    beside = [p for p in parameters_beside(model).values() if p.requires_grad]
    if not beside:
        if also_lr is not None:
            raise ValueError(
                "also_lr is given, and nothing trains beside the blocks: plan with "
                "smt_ext.make_plan(model, batches, also_train=...), or see smt_ext.train_also."
            )
        return [{"params": blocks}]
    also_lr = rate_beside(plan_of(model), lr) if also_lr is None else also_lr
    return [{"params": blocks}, {"params": beside, "lr": also_lr, "weight_decay": 0.0}]


def _blocks_of(model: nn.Module) -> list[nn.Parameter]:
    modules = smt_modules(model)
    if not modules:
        if active := model.__dict__.get(ACTIVE_BLOCKS):
            raise ValueError(
                f"block set {active!r} is active, and sets do not train: load its blocks "
                "without a name onto a fresh base, then build the optimizer."
            )
        raise ValueError(
            f"{type(model).__name__} has no SMT layer. Call smt_ext.patch(model, plan) before "
            "building the optimizer."
        )
    blocks = {id(module.blocks) for module in modules.values()} | ids_beside(modules.values())
    other = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in blocks]
    if other:
        raise ValueError(
            f"{len(other)} parameters beside the SMT blocks require gradients (first: "
            f"{other[0]!r}), and SparseAdamW would leave them untrained. Freeze them, or pass the "
            "blocks here ([m.blocks for m in smt_ext.smt_modules(model).values()]) and train the "
            "others with a second optimizer; or let SparseAdamW train them: smt_ext.train_also."
        )
    training = [module.blocks for module in modules.values() if module.blocks.requires_grad]
    if not training:
        raise ValueError(
            "no blocks require gradients: something has frozen them after smt_ext.patch (requires_grad_("
            "False), PEFT's prepare_model_for_kbit_training). Freeze first, then patch."
        )
    return training


def _auto_rate(lr: str, params: nn.Module | ParamsT) -> float:
    if (factor := auto_factor(lr)) is None:
        raise ValueError(f"lr is {lr!r}, expected a number, 'auto', or such as '2x auto'.")
    if not isinstance(params, nn.Module):
        raise ValueError(
            "lr='auto' takes the rate from the model's plan: pass the patched model, not parameters, "
            "or lr=smt_ext.optim.learning_rate.auto_learning_rate(plan)."
        )
    plan = plan_of(params)
    logger.info(explain_learning_rate(plan, factor))
    return auto_learning_rate(plan, factor)


def _is_elsewhere(param: nn.Parameter) -> bool:
    """Whether the blocks are on another device than the CPU, where their offloaded state is."""
    return param.device.type != "cpu"


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """0-dim float64 on the device without a copy that waits for it."""
    if isinstance(value, Tensor) and value.device.type == device.type:
        return value.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _refuse_capture(device: torch.device) -> None:
    """Raise where a CUDA graph is being captured: each replay would make the same state anew."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SparseAdamW makes state for a parameter (or splits a shared step count) while a CUDA "
            "graph is captured, and every replay would start from it again. Before the capture take "
            "a step in which exactly the parameters have gradients that have them in the graph."
        )


def _unusable_rate(group: dict[str, Any], like: Tensor) -> Tensor:
    """1 where the learning rate is negative, NaN, or too large for the float32 factors of a step."""
    rate = _scalar(group["lr"], like.device)
    # The largest factors: of the first step, and of the decay.
    largest = torch.finfo(torch.float32).max
    limit = largest * min(1 - group["betas"][0], 1 / max(group["weight_decay"], 1))
    return (~((rate >= 0) & (rate <= limit))).to(like.dtype)


def _check_group(group: dict[str, Any], *, rate_may_be_bad: bool = False) -> None:
    """Refuse what a step cannot compute with; a rate from a schedule is judged on the device."""
    rate, betas, eps = group["lr"], group["betas"], group["eps"]
    weight_decay = group["weight_decay"]
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(rate.shape)}, expected one number.")
    elif not _is_number(rate) or not (rate_may_be_bad or 0.0 <= rate < math.inf):
        raise ValueError(f"lr is {rate!r}, expected a number >= 0.")
    two = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not two or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}, expected two numbers in [0, 1).")
    # An entry whose gradient has always been 0 would divide 0 by 0.
    float32 = torch.finfo(torch.float32)
    if not _is_number(eps) or not float32.tiny <= eps <= float32.max:
        raise ValueError(f"eps is {eps!r}, expected a number > 0 that float32 can hold.")
    if not _is_number(weight_decay) or not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay!r}, expected a number >= 0.")
    if absent := next((name for name in ("amsgrad", "maximize") if group.get(name)), None):
        raise ValueError(
            f"{absent} is True, which SparseAdamW does not have: use torch.optim.AdamW."
        )
    if group.get("decay_to", "zero") not in _DECAYS_TO:
        raise ValueError(f"decay_to is {group['decay_to']!r}, expected 'zero' or 'base'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_settings(
    max_grad_norm: float | None, master_dtype: torch.dtype | None, seed: int
) -> None:
    number = max_grad_norm is None or _is_number(max_grad_norm)
    if not number or (max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf):
        raise ValueError(f"max_grad_norm is {max_grad_norm!r}, expected a number > 0 or None.")
    if master_dtype not in (None, torch.float32):
        raise ValueError(f"master_dtype is {master_dtype}, expected torch.float32 or None.")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected a whole number from 0 to 2^63 - 1.")
