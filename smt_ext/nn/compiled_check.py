"""``check_written_``: what a compiled graph does in place of writing changed blocks.

Eager layers write blocks that were changed by hand into their weight before they use it. A compiled
graph cannot: a weight that it changes counts as changed for every graph that has kept it for
backward. So it looks, and refuses. ``checked`` is an empty buffer that the schema marks as mutated,
so that no compiler takes the call for dead code.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..errors import PatchError
from .modules import SMTLayer, live_modules

__all__: list[str] = []

_library = torch.library.Library("smt_ext", "FRAGMENT")
_library.define("check_written_(Tensor(a!) checked, Tensor blocks) -> ()")

# Address of the blocks -> their layer; graphs see plain tensors.
_by_address: dict[int, weakref.ref[SMTLayer]] = {}


@torch.library.register_fake("smt_ext::check_written_", lib=_library)
def _check_written_fake(checked: Tensor, blocks: Tensor) -> None:
    return None


def _check_written(checked: Tensor, blocks: Tensor) -> None:
    layer = _layer_at(blocks.data_ptr())
    if layer is None or layer._sharded_blocks is not None or not layer.blocks_changed():
        return
    if layer.write_if_other_():
        raise PatchError(
            f"the blocks of {layer.layer_name!r} have changed outside optimizer.step(), and a compiled "
            "graph ran before their weight had the new values. Call smt_ext.sync_weights(model) after "
            "changing blocks by hand."
        )


_library.impl("check_written_", _check_written, "CompositeExplicitAutograd")


def _layer_at(address: int) -> SMTLayer | None:
    found = _by_address.get(address)
    layer = None if found is None else found()
    if layer is None or layer.__dict__.get("_weight_state") is None or not _is_at(layer, address):
        _by_address.clear()
        _by_address.update({m.blocks.data_ptr(): weakref.ref(m) for m in live_modules()})
        layer = found() if (found := _by_address.get(address)) is not None else None
    return layer


def _is_at(layer: SMTLayer, address: int) -> bool:
    return layer.blocks.data_ptr() == address
