"""Active questions put to a copy of the model: the answers are readings too."""
