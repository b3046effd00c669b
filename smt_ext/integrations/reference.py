"""The model of before training as a reference, without a second model in memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..patching import original_weights, plan_of

__all__ = ["ReferenceModel"]


class ReferenceModel(nn.Module):
    """A patched model as it was before training, for trainers that take a ``ref_model``.

        trainer = DPOTrainer(model, ref_model=ReferenceModel(model), args=args, ...)

    Calling it runs the very same modules with the exact original weights
    (:func:`smt_ext.original_weights`), in evaluation mode and without gradients. It owns no
    parameters: the blocks' original values, which a patched model keeps anyway, are all that it needs.
    Other attributes (``config``, ``dtype``, ...) are the model's.

    Args:
        model: a patched model.

    Raises:
        PatchError: the model is not patched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        plan_of(model)
        # Past nn.Module: as a submodule the model would be wrapped, moved and saved twice.
        self.__dict__["_policy"] = model
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original model's output; a graph that the trained model has built stays valid."""
        model: nn.Module = self.__dict__["_policy"]
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with original_weights(model):
                return model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_policy"], name)
