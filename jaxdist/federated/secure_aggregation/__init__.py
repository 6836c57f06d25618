"""The sum of clients' integer vectors, and of no client its vector: SecAgg+ (Bell et al. 2020, ePrint 2020/704) on
Bonawitz et al. 2017 (ePrint 2017/281).

`Client` and `Server` are state machines without I/O: messages in, messages out. `rules` says who must stay,
`quantise` makes integers of updates, `in_one_process` runs a whole round; messages are those of `transport.plain`.
No jax here, and no randomness but the operating system's.
"""
