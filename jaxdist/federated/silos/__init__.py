"""Silos: each client a process of its own that alone reads its data, and a server that never sees them.

    roles, share           the processes and which this one is; what of the data it reads
    messages, rules        what is said, and what is asked of whoever drives a machine
    server, silo           the protocol: state machines without I/O; `gathering` is what a round has so far
    training, disk         a silo's numbers: the engine of the simulation for one client; what it keeps
    summing, words         the server's numbers: the same engine adds up; vectors of secure aggregation
    strategy               both as a run sees them
    serving, taking_part   their processes

No jax in roles, messages, rules, server, silo and gathering.
"""
