"""Passive observers: each listens to the loop's events, writes readings, and leaves no trace when detached."""
