"""What a machine or cluster is and what is wrong with it.

Every rank gathers facts (`facts`, `measure`), the ranks meet over plain TCP (`meeting`), and process 0 judges
what all of them saw by pure functions (`network`, `machines`). `examine` is the order in which that happens.
"""
