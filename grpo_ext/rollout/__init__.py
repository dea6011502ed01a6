"""Answers on their way from the sampler to the update: rollouts that are put together, and groups kept for reuse."""
