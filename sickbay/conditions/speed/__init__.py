"""Slow training: the step takes longer than its arithmetic needs."""
