"""Bounded run time for rewards: worker processes, and a time limit for single library calls."""
