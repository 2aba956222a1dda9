"""Numbers in, a verdict out: one condition a file, one chapter a folder. No torch."""
