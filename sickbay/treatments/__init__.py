"""Cures: one treatment a file, each with its safety and, where it can act by itself, its undo."""
