"""The model of before training as a reference, without a second model in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from torch import nn

from ..nn.patching import ids_beside, original_weights, plan_of, smt_modules
from .score_callback import evaluating

__all__ = ["ReferenceModel"]


class ReferenceModel(nn.Module):
    """A patched model as it was before training, for trainers that take a ``ref_model``.

        trainer = DPOTrainer(model, ref_model=ReferenceModel(model), args=args, ...)

    Calling it runs the very same modules with the exact original weights
    (:func:`smt_ext.original_weights`), in evaluation mode and without gradients; a graph that the
    trained model has built stays valid. It owns no parameters: the blocks' original values, which a
    patched model keeps anyway, are all that it needs. Other attributes (``config``, ``dtype``, ...)
    are the model's; its submodules are handed out during a call alone, since at other times they
    compute with the trained weights.

    Args:
        model: a patched model.
        patched: False takes a model that will be patched before it is trained.

    Raises:
        PatchError: the model is not patched.
    """

    _policy: nn.Module
    _active = False

    def __init__(self, model: nn.Module, *, patched: bool = True) -> None:
        super().__init__()
        if patched:
            plan_of(model)
        # Past nn.Module: as a submodule the model would be wrapped, moved and saved twice.
        self.__dict__["_policy"] = model
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Around whatever ``forward`` is: TRL replaces it by one that calls submodules itself.
        with evaluating(self._policy), self._original_weights():
            self._active = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self._active = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; reached through ``__call__``."""
        return self._policy(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original model's, by which trainers tell models apart; what trains is copied."""
        if (destination := kwargs.get("destination")) is not None:
            return destination  # part of another module's state, which this is not
        modules = smt_modules(self._policy).values()
        trained = {id(module.weight) for module in modules} | ids_beside(modules)
        tensors = chain(
            self._policy.named_parameters(remove_duplicate=False),
            self._policy.named_buffers(remove_duplicate=False),
        )
        copied = {name for name, tensor in tensors if id(tensor) in trained}
        with self._original_weights():
            return {
                name: value.clone() if name in copied else value
                for name, value in self._policy.state_dict().items()
                if not name.endswith(".blocks")
            }

    def _original_weights(self) -> AbstractContextManager[Any]:
        """Before it is patched a model holds no others."""
        return original_weights(self._policy) if smt_modules(self._policy) else nullcontext()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_policy"], name)
        if isinstance(value, nn.Module) and not self._active:
            raise AttributeError(
                f"{name!r} of a ReferenceModel computes with the trained weights outside of a call. "
                "Call the reference as a whole, or use smt_ext.original_weights(model)."
            )
        return value
