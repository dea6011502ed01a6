"""Rollouts: everything between the sampler and the loss, and dialogues with text environments."""
