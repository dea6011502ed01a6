"""Ready-to-run recipes: `grpo-ext train math` anywhere, `accelerate launch recipes/math.py` in a checkout."""
