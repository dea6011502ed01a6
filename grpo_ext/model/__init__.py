"""The policy: one frozen backbone and an adapter; with the adapter off, the same backbone is the KL reference."""
