"""NaN loss and gradient issues: the loss stops being a number, or is about to."""
