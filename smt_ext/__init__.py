"""Sparse Matrix Tuning: train the few blocks of a model's weights that matter, freeze the rest."""
