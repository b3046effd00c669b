"""Write the trained model as an ordinary checkpoint that knows nothing of smt_ext."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from .._files import replace_directory
from ..distributed import sharding
from ..errors import PatchError
from ..nn.patching import plan_of
from .artifact import one_writer

__all__ = ["export"]


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
) -> None:
    """Save a patched Hugging Face model, blocks merged, for ``from_pretrained(directory)``.

    The weights hold the trained values at all times, so this only leaves the blocks out. The model
    stays patched and can go on training. The directory appears whole or not at all.

    Args:
        model: a patched model with ``save_pretrained``. Under ``fully_shard`` all ranks must call, and
            rank 0, which gathers the weights in its main memory, writes.
        directory: made if need be, replaced if it exists.
        tokenizer: saved beside the model where given.
        overwrite: also replace a directory that holds other things than our saves.

    Raises:
        PatchError: not patched, or not a Hugging Face model.
        CheckpointError: the disk is full or not writable.
    """
    plan_of(model)
    save_pretrained = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        raise PatchError(
            f"{type(model).__name__} has no save_pretrained, so there is no Hugging Face checkpoint "
            "to write. Use smt_ext.unpatch(model) and torch.save(model.state_dict(), path)."
        )
    sharding.reshard(model)
    with one_writer(model) as writes:
        state = {}
        for name, value in model.state_dict().items():
            if not name.endswith(".blocks"):
                whole = sharding.full(value)
                if writes:
                    state[name] = whole.cpu() if sharding.is_sharded(value) else whole
        if not writes:
            return
        with replace_directory(directory, overwrite=overwrite) as temporary:
            save_pretrained(temporary, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
