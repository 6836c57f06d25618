"""Checkpoints: saved in the background, believed only once committed, restored onto any mesh.

`<run>/checkpoints/step_00000100/` holds Orbax parts (`trainer/`, or one of each independent writer),
`manifest.json`, which names every file with its hash and every leaf with its shape, and `COMMIT`, written last:
without it nothing counts.
No other package imports orbax.
"""

from jaxdist.checkpoint.canonical import from_canonical, to_canonical
from jaxdist.checkpoint.checkpointer import Checkpointer, Found
from jaxdist.checkpoint.errors import CheckpointDiskFull, CheckpointFailed
from jaxdist.checkpoint.read import read
from jaxdist.checkpoint.write import write_part

__all__ = [
    "CheckpointDiskFull",
    "CheckpointFailed",
    "Checkpointer",
    "Found",
    "from_canonical",
    "read",
    "to_canonical",
    "write_part",
]
