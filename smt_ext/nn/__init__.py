"""The patched layers, their autograd, and the patch that makes them (SMT paper, section 3)."""
