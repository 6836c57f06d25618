"""Asynchronous training: parameters on servers, workers that pull, compute and push at their own pace.

    coordinator   who serves which shard, in numbered views; commits checkpoints; not on the way of a push
    servers       one shard of the parameters each; that of shard 0, the lead, also decides: it writes the log
    workers       islands of JAX, of one device or a mesh of their own

Every shard applies the same log of decisions in the same order, to its own part of what workers have pushed. So a
push is applied everywhere or nowhere, one version number is true of all shards, and a checkpoint is a place in the
log.

The protocol (`messages`, `lead`, `shard`, `worker`, `coordinator`) does no I/O: machines are given messages and times
and say what is to be done (`contracts`). What drives them is the network (`node`) or a simulation (`simulated`).
"""
