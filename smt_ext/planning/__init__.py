"""Which blocks train: targets, scores, budget, plan (SMT paper, section 3.1)."""
