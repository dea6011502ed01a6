"""Stages of a rollout: each changes what is trained on once rewards are known."""
