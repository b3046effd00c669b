r"""accelerate's FSDP on CPUs, which accelerate has for accelerators alone.

``AcceleratorState`` asks whether FSDP is wanted, by ``ACCELERATE_USE_FSDP`` or a plugin, only where
processes have GPUs or their like. With :func:`install` it asks on CPUs too, in the same words; all
that accelerate and transformers then do is their own code. As a script it runs another one, and says
of the model what is sharded::

    ACCELERATE_USE_CPU=true accelerate launch --config_file examples/fsdp2.yaml \
        tests/fsdp_on_cpu.py SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import accelerate.accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor


def install() -> None:
    """From now on, in this process."""
    plain = AcceleratorState.__init__

    @functools.wraps(plain)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.distributed_type == DistributedType.MULTI_CPU and (wanted or fsdp_plugin):
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no" and fsdp_plugin is not None:
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def _say_what_is_sharded() -> None:
    prepare = accelerate.accelerator.fsdp2_prepare_model

    def prepare_and_say(accelerator: Any, model: nn.Module) -> nn.Module:
        model = prepare(accelerator, model)
        sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
        accelerator.print(f"FSDP2 on CPU: {sum(sharded)} of {len(sharded)} parameters sharded")
        return model

    accelerate.accelerator.fsdp2_prepare_model = prepare_and_say


if __name__ == "__main__":
    install()
    _say_what_is_sharded()
    _, script, *arguments = sys.argv
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
