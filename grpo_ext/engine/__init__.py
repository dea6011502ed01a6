"""The group engine: what siblings share is computed once, on the model's own cache, with any attention backend."""
