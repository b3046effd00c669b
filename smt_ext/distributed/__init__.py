"""What ranks agree on, and blocks of weights that fully_shard has sharded."""
