"""What is trained: shapes, blocks, the three transformers, and foreign checkpoints."""
