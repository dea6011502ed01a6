"""Checkpoints: which ones are complete, whether they belong to this run, and the best adapter so far."""
