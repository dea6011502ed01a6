"""The policy: a frozen backbone with an adapter. With the adapter off, the same backbone is the KL reference."""
