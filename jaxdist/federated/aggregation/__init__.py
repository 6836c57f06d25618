"""What the server makes of a cohort's messages, and what malicious clients make of theirs.

    messages = jax.vmap(attack)(messages, keys, is_malicious)          # in a simulation
    messages = jax.vmap(lambda m: clip(m, clip_norm))(messages)        # before any rule
    result = aggregate(Median(), messages, weights, axis="clients")    # inside the manual region over that axis

A rule is a function of `Slices`; none looks at where its messages come from. docs/robust_aggregation.md says which
to take.
"""

from jaxdist.federated.aggregation.attacks import Attack, Gaussian, Scaled, flip_labels, malicious_clients
from jaxdist.federated.aggregation.build import attack_of, rule_of
from jaxdist.federated.aggregation.clipping import clip
from jaxdist.federated.aggregation.coordinates import Mean, Median, TrimmedMean
from jaxdist.federated.aggregation.distances import GeometricMedian, Krum
from jaxdist.federated.aggregation.slices import Slices, aggregate

__all__ = [
    "Attack",
    "Gaussian",
    "GeometricMedian",
    "Krum",
    "Mean",
    "Median",
    "Scaled",
    "Slices",
    "TrimmedMean",
    "aggregate",
    "attack_of",
    "clip",
    "flip_labels",
    "malicious_clients",
    "rule_of",
]
