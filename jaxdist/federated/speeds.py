"""Virtual time: how long a client takes for its work."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from jaxdist.config.participation import DeviceSpeeds, LogNormalSpeeds
from jaxdist.federated.draws import uniforms
from jaxdist.federated.traces import read_speeds


def seconds_per_step(of: DeviceSpeeds, names: Sequence[str], seed: int) -> np.ndarray:
    """Virtual seconds of a local step of each client, float64 [clients]: those at speed 1 over the client's speed.

    `names`: of the clients. Raises UserError for a trace that is not in order.
    """
    if isinstance(of, LogNormalSpeeds):
        return of.seconds_per_step / log_normal(of.sigma, len(names), seed)
    return of.seconds_per_step / read_speeds(of.file, names)


def log_normal(sigma: float, num_clients: int, seed: int) -> np.ndarray:
    """exp(sigma z), z standard normal: float64 [clients]."""
    normal = NormalDist()
    draws = uniforms(seed, "device speed", 0, np.arange(num_clients))
    return np.exp(sigma * np.array([normal.inv_cdf(max(u, 2.0**-54)) for u in draws.tolist()]))
