"""How good a model is, and whether to train it longer."""
