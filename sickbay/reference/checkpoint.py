"""Checkpoints of the reference."""

from dataclasses import dataclass


@dataclass
class Progress: ...
