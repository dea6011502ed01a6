"""Rollouts: everything between sampling and the loss, and dialogues with text environments."""
