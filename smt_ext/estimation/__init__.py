"""What a model would need, without having it: memory by method, from shapes alone."""
