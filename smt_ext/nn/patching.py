"""Turn a model's linear layers into SMT layers, and back (SMT paper, section 3)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..architectures import SIBLINGS
from ..distributed import sharding
from ..errors import PatchError, PlanError
from ..layouts import (
    SUPPORTED,
    ExpertMatrix,
    Matrix,
    find_matrix,
    is_conv1d,
    is_supported,
    plain_class,
    sharing_memory,
    tied_weights,
    why_not_called,
)
from ..plan import BlockPlan, LayerPlan
from ..precision import warn_slow_bfloat16
from ..quantization import (
    allow_broadcast,
    allow_repacking,
    logical_numel,
    packed_weight,
    plain_parameters,
    repacked,
    stop_broadcast,
    stop_repacking,
    why_unusable,
)
from . import compiled_check  # noqa: F401  (registers its operator)
from . import step_hooks as optimizer_hooks
from .expert_modules import ExpertInputGroup, SMTExpertWeight
from .functional import WeightState
from .modules import (
    InputGroup,
    SMTConv1D,
    SMTLayer,
    SMTLinear,
    patch_record,
    write_blocks_of,
    write_changed_blocks_of,
)
from .other_parameters import OtherParameters
from .quantized import SMTQuantizedLinear

__all__ = [
    "ACTIVE_BLOCKS",
    "ModuleStatus",
    "Status",
    "changed_beside",
    "changed_buffers",
    "check_trained",
    "ids_beside",
    "original_weights",
    "other_parameters",
    "parameters_beside",
    "patch",
    "patched_root",
    "plan_of",
    "restore_beside",
    "smt_modules",
    "status",
    "sync_weights",
    "train_also",
    "unpatch",
]

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A model whose weights hold a block set (smt_ext.block_sets) has its name under this key in the
# ``__dict__`` of the layers and of the whole.
ACTIVE_BLOCKS = "_smt_active_blocks"


class Patch:
    """What :func:`unpatch` needs to know; one object shared by all SMT layers of a model."""

    def __init__(self, model: nn.Module, plan: BlockPlan, state: WeightState) -> None:
        self.plan = plan
        # By owner and name: fully_shard replaces parameters, and must be able to free the old ones.
        self.frozen: list[tuple[nn.Module, str]] = []
        self.state = state
        self.others = OtherParameters(model)
        # 4-bit layers, trained or not, that bitsandbytes must not rewrite while others train.
        self.not_repacked: list[nn.Module] = []
        self.not_broadcast: list[str] = []
        self.model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self.hook = model.register_forward_pre_hook(_write_before_gathering)
        # In inference torch's encoder layers compute past their linears' forward, unless one has a hook.
        self.on_encoders = [
            module.register_forward_pre_hook(_compute_by_the_linears)
            for module in model.modules()
            if isinstance(module, nn.TransformerEncoderLayer) and smt_modules(module)
        ]
        # And encoders hand them nested tensors then.
        self.nesting = [
            module
            for module in model.modules()
            if isinstance(module, nn.TransformerEncoder)
            and smt_modules(module)
            and module.use_nested_tensor
        ]
        for module in self.nesting:
            module.use_nested_tensor = False

    def let_go(self, model: nn.Module) -> None:
        """Undo what was done to the model, layers and frozen parameters aside."""
        self.hook.remove()
        for hook in self.on_encoders:
            hook.remove()
        for module in self.nesting:
            module.use_nested_tensor = True
        for linear in self.not_repacked:
            allow_repacking(linear)
        allow_broadcast(model, self.not_broadcast)

    def reshard(self) -> None:
        """Put gathered parameters back into their shards (see :func:`.sharding.reshard`)."""
        model = None if self.model is None else self.model()
        if model is not None:
            sharding.reshard(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}  # the copy's model is another one

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        optimizer_hooks.install()  # in this process nothing may have been patched yet


def _compute_by_the_linears(encoder: nn.Module, args: Any) -> None:
    """A hook that is there."""


def _write_before_gathering(model: nn.Module, args: Any) -> None:
    """Write changed blocks under ``fully_shard``, whose layers see gathered copies in forward."""
    if torch.compiler.is_compiling() or not sharding.is_fsdp(model):
        return
    record = _patch_of(model)
    modules = list(smt_modules(model).values())
    first = next(iter(model._forward_pre_hooks)) != record.hook.id
    if first:
        # The hook of fully_shard has come first, and gathered what the root itself has to gather.
        record.hook.remove()
        record.hook = model.register_forward_pre_hook(_write_before_gathering, prepend=True)
        for module in modules:
            module.under_fsdp = True
    elif any(module.unseen_shards() for module in modules):
        record.reshard()
    if any(module.blocks_changed() for module in modules):
        sharding.reshard(model, drain=first)
        write_changed_blocks_of(m for m in modules if sharding.is_sharded(m.blocks))


def patched_root(model: nn.Module) -> nn.Module:
    """The model that was patched, which wrappers may have put others around; else the model itself.

    Raises:
        PatchError: several models in it are patched.
    """
    if (record := _only_record(model)) is not None:
        root: nn.Module | None = None if record.model is None else record.model()
        for module in model.modules():
            # A copy's record knows no model, but its hook is where it was.
            if module is root or (root is None and record.hook.id in module._forward_pre_hooks):
                return module
    return model


def _only_record(model: nn.Module) -> Patch | None:
    """What the SMT layers of a model share; None where it has none."""
    records: dict[int, Patch] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if (record := patch_record(module)) is not None:
            records[id(record)] = record
            first.setdefault(id(record), name)
    if len(records) > 1:
        raise PatchError(
            f"this {type(model).__name__} holds {len(records)} models that were patched one by one "
            f"(their first layers: {', '.join(map(repr, first.values()))}), and each has a plan and a "
            "base of its own. Pass one of them; where one holds another, keep that outside of its "
            "modules (in a list, say), or unpatch it."
        )
    return next(iter(records.values()), None)


def smt_modules(model: nn.Module) -> dict[str, SMTLayer]:
    """The SMT layers of a model by their names in the plan, in the model's order."""
    return {
        module.plan_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, SMTLayer)
    }


def plan_of(model: nn.Module) -> BlockPlan:
    """The plan that the model was patched with.

    Raises:
        PatchError: the model is not patched, or holds several that are.
    """
    return _patch_of(model).plan


def check_trained(model: nn.Module) -> None:
    """Raise PatchError where the model is not patched, or its weights are those of before training."""
    _patch_of(model).state.check_trained()


def patch(
    model: nn.Module,
    plan: BlockPlan,
    *,
    block_dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> nn.Module:
    """Make the planned blocks, and what the plan trains beside them, trainable; freeze all else.

    Each module of the plan becomes an :class:`SMTLayer`: the same object with the same ``weight``
    and ``bias``, and a new parameter ``blocks`` (S, L, L). Build the optimizer *after* this call.
    Everything is checked before anything is changed.

    Args:
        model: any ``nn.Module`` whose planned layers are ``nn.Linear``, ``Conv1D`` or experts of
            transformers, or 4-bit and 8-bit layers of bitsandbytes and torchao.
        plan: from :func:`smt_ext.make_plan` or :meth:`BlockPlan.load`.
        block_dtype: dtype of ``blocks``, their gradients and the moments. Default: float32 for
            bfloat16 and float16 weights (small updates vanish in a half-precision weight; the
            float32 blocks are its master copy) and for quantised ones, else the dtype of the weight.
        freeze: set ``requires_grad=False`` on every other parameter, and remember which had it. Those
            of ``plan.also_train`` train; to let others do see :func:`train_also`.

    Returns:
        ``model`` itself.

    Raises:
        PlanError: the plan does not fit the model; names the first module that differs.
        PatchError: already patched with another plan, a block set is active, a tied weight, or an
            unusable dtype.
    """
    warn_slow_bfloat16(model)
    return _patch(model, plan, block_dtype, freeze)


def patch_meta(model: nn.Module, plan: BlockPlan) -> nn.Module:
    """:func:`patch` for a model on the meta device: shapes without values, to estimate memory.

    Not for training: blocks made here would not take their values from weights loaded later.
    """
    return _patch(model, plan, None, True, allow_meta=True)


def _patch(
    model: nn.Module,
    plan: BlockPlan,
    block_dtype: torch.dtype | None,
    freeze: bool,
    *,
    allow_meta: bool = False,
) -> nn.Module:
    if patched := smt_modules(model):
        if _patch_of(model).plan.fingerprint == plan.fingerprint:
            return model
        raise PatchError(
            f"model is already patched with another plan ({len(patched)} modules, first "
            f"{next(iter(patched))!r}). Call smt_ext.unpatch(model) first."
        )
    for module in model.modules():
        if active := module.__dict__.get(ACTIVE_BLOCKS):
            raise PatchError(
                f"block set {active!r} is active, so the weights are not the base model's. Call "
                "smt_ext.block_sets.deactivate(model), then patch."
            )
    wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapper is not None:
        raise PatchError(
            "model is wrapped in DistributedDataParallel, which would not see the new blocks and so "
            "not reduce their gradients. Patch first, then wrap."
        )
    _refuse_wrapped(model)
    if (name := repacked(model)) is not None:
        raise PatchError(
            f"{name!r} was rewritten by bitsandbytes for inference on the CPU and lets no gradient "
            "through. Load the model again, and plan and patch it before its first forward."
        )
    plan.validate(model)
    layers = {name: plan.layers[name] for name in plan.layers if plan.layers[name].blocks}
    if not layers:
        raise PlanError("the plan selects no block: raise the budget and plan again.")
    modules = dict(model.named_modules(remove_duplicate=False))
    targets: dict[str, Matrix] = {}
    for name in layers:
        target = find_matrix(modules, name)
        assert target is not None
        _check_target(name, target, block_dtype, allow_meta)
        targets[name] = target
    _check_tied(model, targets)

    state = WeightState()
    groups = _input_groups(plan, layers, targets)
    required_grad = [p for p in model.parameters() if p.requires_grad]
    converted: list[SMTLayer] = []
    try:
        for name, target in targets.items():
            dtype = block_dtype or _default_block_dtype(target)
            converted.append(
                _smt_class(target).convert_(name, target, layers[name], groups[name], state, dtype)
            )
    except BaseException:
        for module in converted:
            module.revert_(restore=False)
        for parameter in required_grad:
            parameter.requires_grad_(True)
        raise

    if freeze:
        for parameter in required_grad:
            parameter.requires_grad_(False)
    record = Patch(model, plan, state)
    record.not_repacked = stop_repacking(model)
    record.not_broadcast = stop_broadcast(model)
    frozen = {id(p) for p in required_grad if not p.requires_grad}
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in frozen:
                frozen.remove(id(parameter))
                record.frozen.append((owner, name))
    for module in converted:
        module.__dict__["_smt_patch"] = record
    try:
        train_also(model, plan.also_train)
    except BaseException:
        unpatch(model)
        raise
    optimizer_hooks.install()
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise PatchError where a wrapper's name would stand before all others, in plans and files."""
    # By name: torch.compile's class comes with a compiler that takes a second to import.
    kind = type(model).__name__
    inside = {"OptimizedModule": "_orig_mod", "DataParallel": "module"}.get(kind)
    if inside is not None:
        raise PatchError(
            f"model is a {kind}, a wrapper. Plan and patch the model inside (model.{inside}) before "
            "wrapping it."
        )


def train_also(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Let parameters of a patched model (norms, embeddings, a head) train beside the blocks.

    Unlike ``requires_grad_(True)`` this keeps their values of now on the CPU, so that ``unpatch(model,
    restore=True)``, :func:`original_weights` and the digests of the base model stay exact.
    :class:`smt_ext.SparseAdamW` takes them as a second parameter group. Plans can name them
    (``make_plan(also_train=...)``).

    Args:
        names: of parameters, as in ``model.named_parameters()``.

    Returns:
        ``model``.

    Raises:
        PatchError: not patched; or one does not exist, is trained by blocks, shares memory with another,
            is no floating-point number, or has been training already. Nothing is changed.
    """
    if isinstance(names, str):
        raise PatchError(f"names is the text {names!r}, expected several: [{names!r}].")
    record = _patch_of(model)
    record.state.check_trained()
    root, wanted = patched_root(model), dict.fromkeys(names)
    owned = {id(p) for module in smt_modules(root).values() for p in (module.weight, module.blocks)}
    parameters, kept = dict(root.named_parameters()), record.others.originals()
    shared = sharing_memory([*parameters.items(), *root.named_buffers()])
    for name in wanted:
        parameter = parameters.get(name)
        if parameter is None:
            raise PatchError(f"{name!r} is no parameter of this {type(root).__name__}.")
        if id(parameter) in owned:
            raise PatchError(
                f"{name!r} trains by blocks already. Leave it out of the plan or of names."
            )
        if name in shared:
            raise PatchError(
                f"{name!r} shares memory with {shared[name]!r}, which would train too. Untie it first "
                "(a cloned parameter), then patch."
            )
        if not parameter.is_floating_point():
            raise PatchError(f"{name!r} has dtype {parameter.dtype}, which cannot train.")
        if id(parameter) not in kept and record.others.changed({name: parameter}):
            raise PatchError(
                f"{name!r} has changed since smt_ext.patch, so its value before training is unknown. "
                "Call train_also right after patch."
            )
    for name in wanted:
        path, _, last = name.rpartition(".")
        if id(parameters[name]) not in kept:
            record.others.keep(root.get_submodule(path), last)
        parameters[name].requires_grad_(True)
    return model


def other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains beside the blocks of a patched model, or has until it was frozen, by name."""
    modules = smt_modules(model).values()
    owned = {id(p) for module in modules for p in (module.weight, module.blocks)}
    beside = ids_beside(modules)
    return {
        name: parameter
        for name, parameter in patched_root(model).named_parameters()
        if id(parameter) not in owned and (parameter.requires_grad or id(parameter) in beside)
    }


def parameters_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of :func:`other_parameters` those of :func:`train_also`, whose values before are known."""
    known = _patch_of(model).others.originals()
    return {name: p for name, p in other_parameters(model).items() if id(p) in known}


def ids_beside(modules: Iterable[SMTLayer]) -> set[int]:
    """``id`` of all parameters that :func:`train_also` lets train in the models of these layers."""
    records = {id(r): r for r in map(patch_record, modules) if r is not None}.values()
    return {number for record in records for number in record.others.originals()}


def changed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers that training has changed (running statistics, averages), by name."""
    return _patch_of(model).others.changed_buffers(patched_root(model))


def changed_beside(model: nn.Module) -> list[str]:
    """Names of what is no block and is, or may be, other than before training."""
    changed = _patch_of(model).others.changed(other_parameters(model))
    return [*changed, *changed_buffers(model)]


def restore_beside(model: nn.Module) -> None:
    """Write the values of before training into buffers, and what :func:`train_also` lets train."""
    _patch_of(model).others.restore()


def unpatch(model: nn.Module, *, restore: bool = False) -> nn.Module:
    """Turn the SMT layers back into the plain modules they were, in place.

    Args:
        model: a patched model.
        restore: True puts the weights of before training back, bit for bit; False (default)
            keeps the trained values, so that the result is an ordinary fine-tuned model.

    Returns:
        ``model`` itself, with the ``requires_grad`` flags that it had before :func:`patch`.

    Raises:
        PatchError: the model is not patched, :func:`original_weights` is active, a quantised weight
            could not take its trained blocks, or, with ``restore``, another parameter has trained
            whose value of before is unknown (see :func:`train_also`).
    """
    record = _patch_of(model)
    record.state.check_trained()
    for name, module in model.named_modules():
        if plain_class(module) is not type(module) and (why := why_not_called(module)) is not None:
            raise PatchError(f"{name!r} {why}.")
    modules = list(smt_modules(model).values())
    if restore:
        record.others.check_known(other_parameters(model))
    else:
        for module in modules:
            module.check_revertible()
    for module in modules:
        module.check_holds_weight()
    # Some may be gone (bias = None).
    frozen = [getattr(owner, name, None) for owner, name in record.frozen]
    for module in modules:
        del module.__dict__["_smt_patch"]
        module.revert_(restore=restore)
    record.let_go(model)
    if restore:
        record.others.restore()
    for owner, name, _ in record.others.kept:
        owner.get_parameter(name).requires_grad_(False)
    for parameter in frozen:
        if parameter is not None:
            parameter.requires_grad_(True)
    return model


@contextmanager
def original_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes with its weights of before training, bit for bit.

    For reference log-probabilities (DPO, KL penalties) without a second model. Gradients are off
    inside; a graph built before stays valid, because the trained values come back exactly.
    Costs S x L x L elements a layer while it lasts. On a model under ``fully_shard`` all ranks enter
    and leave together, as they run its forward together.

    Raises:
        PatchError: the model is not patched, gradients are asked for inside, or another parameter has
            trained whose value of before is unknown (see :func:`train_also`).
    """
    record = _patch_of(model)
    state = record.state
    if state.holds_original:
        with torch.no_grad():
            yield model
        return
    record.reshard()
    record.others.check_known(other_parameters(model))
    modules = list(smt_modules(model).values())
    write_changed_blocks_of(modules)
    for module in modules:
        module.write_changed_blocks_(by_value=True)
    trained = [module.read_held_blocks() for module in modules]
    try:
        state.holds_original = True
        for module in modules:
            module.write_blocks_(module.original_blocks, bump_version=False)
        with torch.no_grad(), record.others.put_back():
            try:
                yield model
            finally:
                record.reshard()
    finally:
        record.reshard()
        for module, blocks in zip(modules, trained, strict=True):
            module.write_blocks_(blocks, bump_version=False)
        state.holds_original = False


def sync_weights(model: nn.Module) -> None:
    """Write the trained blocks into the weights.

    Needed only after changing ``blocks`` by hand: ``SparseAdamW`` writes both in one pass, and for
    every other ``torch.optim.Optimizer`` a hook does this after each step.
    """
    record = _patch_of(model)
    record.state.check_trained()
    record.reshard()
    write_blocks_of(smt_modules(model).values())


@dataclass(frozen=True)
class ModuleStatus:
    """One SMT layer: (N, K), L, S, and how many entries of its weight train."""

    name: str
    weight_shape: tuple[int, int]
    block_size: int
    num_blocks: int
    trainable: int
    weight_dtype: torch.dtype
    block_dtype: torch.dtype


@dataclass(frozen=True)
class Status:
    """What a patched model trains and what that costs; ``str()`` gives a short table.

    Attributes:
        modules: the SMT layers in the model's order.
        trainable: entries that train, in blocks (without padding of ragged ones) and beside them.
        total: parameters of the model, blocks not counted twice.
        block_bytes: bytes of the ``blocks`` parameters; gradients take the same again.
        moment_bytes: bytes of Adam's two moments for all that trains, under
            :class:`smt_ext.SparseAdamW`.
        beside: of ``trainable``, the entries of parameters that train whole.
        saved_bytes_per_token: input columns that all SMT layers keep for backward, per token.
    """

    modules: tuple[ModuleStatus, ...]
    trainable: int
    total: int
    block_bytes: int
    moment_bytes: int
    saved_bytes_per_token: int
    beside: int = 0

    @property
    def percent(self) -> float:
        """Trained share of the model's parameters, in percent."""
        return 100.0 * self.trainable / self.total

    def __str__(self) -> str:
        kinds: defaultdict[str, list[ModuleStatus]] = defaultdict(list)
        for module in self.modules:
            kinds[module.name.rpartition(".")[2]].append(module)
        lines = [
            f"SMT: {self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g} %), "
            f"{sum(m.num_blocks for m in self.modules):,} blocks in {len(self.modules)} modules",
            f"{'kind':<16}{'modules':>9}{'blocks':>9}{'parameters':>14}{'share':>8}",
        ]
        for kind, members in kinds.items():
            trainable = sum(m.trainable for m in members)
            lines.append(
                f"{kind:<16}{len(members):>9}{sum(m.num_blocks for m in members):>9}"
                f"{trainable:>14,}{trainable / self.trainable:>8.1%}"
            )
        if self.beside:
            lines.append(
                f"{'beside blocks':<34}{self.beside:>14,}{self.beside / self.trainable:>8.1%}"
            )
        mb = 1e-6
        lines.append(
            f"blocks {self.block_bytes * mb:.1f} MB, gradients {self.block_bytes * mb:.1f} MB, "
            f"moments {self.moment_bytes * mb:.1f} MB, "
            f"saved input columns {self.saved_bytes_per_token:,} bytes a token"
        )
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """Describe what trains in a patched model.

    Raises:
        PatchError: the model is not patched.
    """
    _patch_of(model)
    patched = smt_modules(model)
    groups = {id(m._input_group): (m._input_group, m) for m in patched.values()}
    modules = tuple(
        ModuleStatus(
            name=name,
            weight_shape=m.layer_plan.shape,
            block_size=m.block_size,
            num_blocks=len(m.layer_plan.blocks),
            trainable=m.layer_plan.num_parameters,
            weight_dtype=m.value_dtype,
            block_dtype=m.blocks.dtype,
        )
        for name, m in patched.items()
    )
    blocks = [module.blocks for module in patched.values()]
    beside = list(parameters_beside(model).values())
    block_ids = {id(b) for b in blocks}
    plain = next((p.dtype for p in plain_parameters(model) if id(p) not in block_ids), None)
    return Status(
        modules=modules,
        trainable=sum(m.trainable for m in modules) + sum(p.numel() for p in beside),
        total=sum(logical_numel(p) for p in model.parameters() if id(p) not in block_ids),
        block_bytes=sum(b.numel() * b.element_size() for b in blocks),
        moment_bytes=sum(2 * b.numel() * max(4, b.element_size()) for b in [*blocks, *beside]),
        saved_bytes_per_token=sum(
            group.width * _column_dtype(module, plain).itemsize for group, module in groups.values()
        ),
        beside=sum(p.numel() for p in beside),
    )


def _column_dtype(layer: SMTLayer, plain: torch.dtype | None) -> torch.dtype:
    """What a layer keeps columns in outside autocast; ``plain``: dtype of what is not quantised."""
    if not isinstance(layer, SMTQuantizedLinear):
        return layer.value_dtype
    return getattr(layer, "compute_dtype", None) or plain or layer.value_dtype


def _patch_of(model: nn.Module) -> Patch:
    if (record := _only_record(model)) is not None:
        if record.model is None or record.model() is None:
            record.model = weakref.ref(patched_root(model))
        return record
    if active := model.__dict__.get(ACTIVE_BLOCKS):
        raise PatchError(
            f"{type(model).__name__} has no SMT layer: block set {active!r} is active, in plain "
            "weights. Save it with smt_ext.save_blocks(model, directory, name=...) and load it "
            "without a name onto a fresh base, which can be exported and trained on."
        )
    raise PatchError(
        f"{type(model).__name__} has no SMT layer. Call smt_ext.patch(model, plan) first."
    )


def _default_block_dtype(target: Matrix) -> torch.dtype:
    if isinstance(target, nn.Module) and packed_weight(target) is not None:
        return torch.float32
    weight_dtype = _weight_of(target).dtype
    return torch.float32 if weight_dtype in (torch.bfloat16, torch.float16) else weight_dtype


def _smt_class(target: Matrix) -> type[SMTLayer]:
    if isinstance(target, ExpertMatrix):
        return SMTExpertWeight
    if packed_weight(target) is not None:
        return SMTQuantizedLinear
    return SMTConv1D if is_conv1d(target) else SMTLinear


def _weight_of(target: Matrix) -> nn.Parameter:
    weight = target.weight
    assert isinstance(weight, nn.Parameter)  # see _check_target
    return weight


def _check_target(
    name: str, target: Matrix, block_dtype: torch.dtype | None, allow_meta: bool
) -> None:
    packed = None
    if (why := why_not_called(target)) is not None:
        raise PatchError(f"{name!r} {why}.")
    if isinstance(target, nn.Module):
        if (why := why_unusable(target)) is not None:
            raise PatchError(f"{name!r} {why}; or leave it out of the plan's targets.")
        packed = packed_weight(target)
    if not is_supported(target):
        raise PatchError(
            f"{name!r} is a {type(target).__name__}, and only exactly {SUPPORTED} can be patched: a "
            "subclass may compute something else. Remove a parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), patch before fully_shard, or leave "
            "the module out of the plan's targets."
        )
    if not isinstance(target.weight, nn.Parameter):
        raise PatchError(
            f"the weight of {name!r} is computed from other parameters (weight_norm, prune). Remove "
            "that (torch.nn.utils.remove_weight_norm, prune.remove), or leave the module out of the "
            "plan's targets."
        )
    weight = _weight_of(target)
    if sharding.is_sharded(weight):
        raise PatchError(
            f"{name!r} is sharded already. Patch first, on every rank, then call fully_shard(model)."
        )
    if weight.is_meta and not allow_meta:
        raise PatchError(
            f"{name!r} is on the meta device and has no values yet. Load the weights, then patch."
        )
    if packed is None and _overlaps_itself(weight):
        raise PatchError(
            f"several entries of the weight of {name!r} share memory (shape {tuple(weight.shape)}, "
            f"strides {weight.stride()}), and no block could change alone. Give each its own: "
            "module.weight = torch.nn.Parameter(module.weight.detach().clone("
            "memory_format=torch.contiguous_format))."
        )
    if packed is not None:
        if block_dtype not in (None, torch.float32):
            raise PatchError(
                f"block_dtype is {block_dtype}, but the blocks of {name!r} are the only copy of its "
                f"trained values ({packed.scheme.title}): expected torch.float32."
            )
        return
    if weight.dtype not in _WEIGHT_DTYPES:
        raise PatchError(
            f"{name!r} has weight dtype {weight.dtype}, expected one of float32, bfloat16, "
            "float16, float64. Convert the model (model.to(torch.bfloat16)) or dequantize it."
        )
    if block_dtype not in (None, weight.dtype, torch.float32, torch.float64):
        raise PatchError(
            f"block_dtype is {block_dtype}, but {name!r} has weight dtype {weight.dtype}: expected "
            "the weight's own dtype, torch.float32 or torch.float64."
        )


def _overlaps_itself(weight: torch.Tensor) -> bool:
    reach = 0
    for step, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += step * (size - 1)
    return False


def _check_tied(model: nn.Module, targets: Iterable[str]) -> None:
    tied = tied_weights(model)
    for name in targets:
        if name in tied:
            raise PatchError(
                f"{name!r} shares its weight with {tied[name]!r} (tied). Training blocks of it would "
                "change both. Leave it out of the targets, or untie it first: "
                "module.weight = torch.nn.Parameter(module.weight.detach().clone()), and set "
                "config.tie_word_embeddings = False for a Hugging Face model."
            )


def _input_groups(
    plan: BlockPlan, layers: dict[str, LayerPlan], targets: dict[str, Matrix]
) -> dict[str, Any]:
    """One InputGroup per set of modules that read the same tensor with the same L and K.

    Experts have an ExpertInputGroup each.
    """
    candidates = [list(names) for names in plan.input_groups] or sibling_groups(list(layers))
    grouped: dict[str, Any] = {
        name: ExpertInputGroup(layers[name], target)
        for name, target in targets.items()
        if isinstance(target, ExpertMatrix)
    }
    for names in candidates:
        members: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
        for name in names:
            if name in layers and name not in grouped:
                layer = plan.layers[name]
                members[layer.block_size, layer.shape[1]].append(name)
        for same in members.values():
            group = InputGroup([plan.layers[name] for name in same])
            grouped.update(dict.fromkeys(same, group))
    for name in layers:
        if name not in grouped:
            grouped[name] = InputGroup([plan.layers[name]])
    return grouped


def sibling_groups(names: list[str]) -> list[list[str]]:
    groups: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        parent, _, last = name.rpartition(".")
        for index, siblings in enumerate(SIBLINGS):
            if last in siblings:
                groups[parent, index].append(name)
    return list(groups.values())
