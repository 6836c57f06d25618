"""The federated strategy: data stays with its clients; a sampled cohort trains locally, and the server aggregates."""
