"""Checkpoints: which ones are whole, whether they belong to this run, and the best adapter so far."""
