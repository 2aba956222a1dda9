"""Checkpoints that survive kills, damage and full disks."""
