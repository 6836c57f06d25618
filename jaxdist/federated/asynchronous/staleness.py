"""What a message counts that comes late, s steps of the server after its client started."""

import numpy as np

from jaxdist.config.participation import Constant, Hinge, Polynomial


def staleness_weights(of: Constant | Polynomial | Hinge, staleness: np.ndarray) -> np.ndarray:
    """Float64, like `staleness`; 1 where that is 0. Xie et al. 2019 (arXiv 1903.03934), section 5.2."""
    s = staleness.astype(float)
    match of:
        case Polynomial():
            return (1 + s) ** -of.exponent
        case Hinge():
            return 1 / (1 + of.slope * np.maximum(s - of.free, 0))
        case Constant():
            return np.ones_like(s)
