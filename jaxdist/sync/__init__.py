"""The synchronous strategy: all workers agree at every step, by one reduction of their gradients; or replicas take
steps of their own, and agree on parameters every so often."""
