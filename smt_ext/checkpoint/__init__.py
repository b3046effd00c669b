"""Everything that is written of a trained model, and read back."""
