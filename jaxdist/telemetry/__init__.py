"""What a run writes down about itself: metrics, events, progress, FLOPs, bytes on the wire, profiles, logs.

`schema` says what a line of metrics.jsonl holds; `run_directory` reads and writes the files; `sinks` and
`progress` show the same records elsewhere; `flops` and `wire` count work and traffic from the program itself.
"""
