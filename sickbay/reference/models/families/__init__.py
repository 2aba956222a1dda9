"""How other programs name the same weights: one file per family of checkpoints."""
