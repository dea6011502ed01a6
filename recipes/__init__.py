"""Runs that are ready to start: `accelerate launch recipes/math.py` in a checkout, `grpo-ext train math` anywhere."""
