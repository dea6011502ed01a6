"""Stages of a rollout. Each one changes what is trained on, once rewards are known."""
