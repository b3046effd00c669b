"""Several trained sets of blocks on one base model: load by name, switch in place, merge."""

from .checkpoint.block_sets import activate as activate
from .checkpoint.block_sets import active_blocks as active_blocks
from .checkpoint.block_sets import deactivate as deactivate
from .checkpoint.block_sets import loaded_blocks as loaded_blocks
from .checkpoint.block_sets import merge_blocks as merge_blocks
from .checkpoint.block_sets import remove_blocks as remove_blocks
