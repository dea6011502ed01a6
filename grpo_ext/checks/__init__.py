"""Checks of a run: settings, data, prompts, rewards and memory before the first step, and a watch during training."""
