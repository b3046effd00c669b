"""SMT in transformers and TRL: loading, trainers, reference models, model cards."""
