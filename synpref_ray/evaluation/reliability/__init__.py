"""How far a reward model can be relied on: calibration, biases and what mending them does, attacks, and tests between two models."""
