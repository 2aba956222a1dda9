"""The checklist before a long run: questions put to a model, its batches and its loss, each with a verdict and a time limit."""
