"""Passive observers: each hooks one thing, writes readings, and leaves no trace when detached."""
