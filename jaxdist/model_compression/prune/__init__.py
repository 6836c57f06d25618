"""Pruning: masks of live weights in the state of any optax chain, on any mesh.

`prune(optax.adamw(1e-3), Pruning(0.9, Schedule(begin=100, end=1000, every=50)))` goes where `optax.adamw` was.
"""

from jaxdist.model_compression.prune.methods import METHODS, Method, Weights
from jaxdist.model_compression.prune.pruning import Pruning, matching
from jaxdist.model_compression.prune.rewind import prune_and_rewind
from jaxdist.model_compression.prune.sparsity import Schedule
from jaxdist.model_compression.prune.transform import PruneState, prune

__all__ = [
    "METHODS",
    "Method",
    "PruneState",
    "Pruning",
    "Schedule",
    "Weights",
    "matching",
    "prune",
    "prune_and_rewind",
]
