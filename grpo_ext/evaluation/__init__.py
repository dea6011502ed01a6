"""Accuracy on held-out problems with confidence intervals: before, during and after a run, and in `grpo-ext eval`."""
