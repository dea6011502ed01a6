"""The maths of GRPO as pure functions: tensors in, tensors out; no trainer, no model, no device logic."""
