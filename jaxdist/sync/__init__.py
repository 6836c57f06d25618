"""The synchronous strategy: all workers agree at every step, by one reduction of their gradients."""
