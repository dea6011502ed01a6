"""The engine: computes each prompt once for all of its siblings, on the model's own KV cache and attention backend."""
