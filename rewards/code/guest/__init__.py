"""Scripts that run inside the sandbox. They are sent there as text, so they import nothing but the standard library."""
