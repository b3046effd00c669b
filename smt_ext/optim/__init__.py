"""SparseAdamW: Adam over the selected blocks alone, in place in the weights."""
