"""The parts of the training loop: loss, optimizers, schedules, and each remedy by itself."""
