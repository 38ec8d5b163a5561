"""Objective, optimiser, checkpoints, and the training loop."""
