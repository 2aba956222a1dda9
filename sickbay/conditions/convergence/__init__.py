"""Poor convergence: the loss does not go where the data and the model would let it."""
