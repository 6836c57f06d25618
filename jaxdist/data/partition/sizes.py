"""How many samples each client has."""

import numpy as np

from jaxdist.config import partition as blocks
from jaxdist.data.partition.fitting import apportion
from jaxdist.data.partition.repair import lift


def sizes_of(
    block: blocks.Sizes | None, num_samples: int, num_clients: int, minimum: int, random: np.random.Generator
) -> np.ndarray:
    """Sizes, int64 [clients], of sum `num_samples`, each at least `minimum`; None is equal.

    log_normal: exp(sigma z_c) with z standard normal; power_law: r^-exponent with r a random permutation of
    1 to num_clients; both in proportion, by largest remainder, and then `lift`ed.
    """
    match block:
        case blocks.LogNormalSizes(sigma=sigma):
            logarithms = sigma * random.standard_normal(num_clients)
        case blocks.PowerLawSizes(exponent=exponent):
            logarithms = -exponent * np.log(random.permutation(num_clients) + 1.0)
        case _:
            logarithms = np.zeros(num_clients)
    shares = np.exp(logarithms - logarithms.max())
    return lift(apportion(shares[None], np.array([num_samples]))[0], minimum)
