"""``python -m smt_ext.cli``: what ``smt-ext`` does, for launchers that take a module (torchrun)."""

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
