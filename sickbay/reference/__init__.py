"""A healthy transformer program in plain PyTorch: what sickbay calls well, and where faults are planted to test it."""
