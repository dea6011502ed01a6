"""What happens around the steps of a run: where its seconds went, what it says at the start, how it shows progress."""
