"""Data: sources of samples, one global order over them, and the loader that puts batches on devices.

A `Source` gives samples by id; a `Stream` is a subset of ids in a seeded order, so that a batch is a function
of seed and step alone; a `Loader` reads the rows that this process's devices hold. `build_data` makes the
training and validation streams from a config block.
"""
