"""Differential privacy of clients: clipping, noise, and what a run has spent.

`clip` and `noise` are the two pieces, `central` puts them together for a server that is trusted with the sum, `local`
for one that is not; `accountant` says what it comes to, with dp-accounting (the extra `jaxdist[privacy]`).
"""
