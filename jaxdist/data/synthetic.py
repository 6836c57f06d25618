"""Synthetic data whose best possible result is known.

Drawn by `np.random.default_rng(data_seed)`: the same wherever NumPy is the same.
"""

import math

import numpy as np

from jaxdist.data.arrays import Arrays


def blobs(samples: int, features: int, classes: int, separation: float, data_seed: int) -> Arrays:
    """Class k is a unit Gaussian around separation * e_k: x float32 [features], y int32."""
    assert features >= classes
    random = np.random.default_rng(data_seed)
    y = random.integers(classes, size=samples, dtype=np.int32)
    x = random.standard_normal((samples, features), np.float32)
    x[np.arange(samples), y] += np.float32(separation)
    return Arrays({"x": x, "y": y}, classes=classes)


def blobs_best_accuracy(classes: int, separation: float) -> float:
    """Bayes accuracy of `blobs`: the largest of the first `classes` coordinates is the true one.

    The integral of phi(z) Phi(z + separation)^(classes - 1) over z.
    """
    z = np.linspace(-10.0, 10.0, 20_001)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)((z + separation) / math.sqrt(2)))
    return float(np.sum(density * below ** (classes - 1)) * (z[1] - z[0]))


def regression(samples: int, features: int, outputs: int, noise: float, data_seed: int) -> Arrays:
    """y = x w + noise: x float32 [features] unit Gaussian, w too over sqrt(features); y float32 [outputs]."""
    random = np.random.default_rng(data_seed)
    weights = random.standard_normal((features, outputs), np.float32) / np.float32(math.sqrt(features))
    x = random.standard_normal((samples, features), np.float32)
    y = x @ weights + np.float32(noise) * random.standard_normal((samples, outputs), np.float32)
    return Arrays({"x": x, "y": y})


def ratings(samples: int, users: int, items: int, rank: int, noise: float, data_seed: int) -> Arrays:
    """Ratings of pairs drawn at random: user, item int32; y = b_u + b_i + p_u . q_i + noise, float32.

    Biases and products p_u . q_i are centred, each with a standard deviation of 1.
    """
    random = np.random.default_rng(data_seed)
    of_users, of_items = (random.standard_normal((count, rank + 1), np.float32) for count in (users, items))
    user, item = (random.integers(count, size=samples, dtype=np.int32) for count in (users, items))
    p, q = of_users[user], of_items[item]
    y = p[:, 0] + q[:, 0] + (p[:, 1:] * q[:, 1:]).sum(axis=1) / np.float32(math.sqrt(rank))
    y += np.float32(noise) * random.standard_normal(samples, np.float32)
    return Arrays({"user": user, "item": item, "y": y}, ids={"user": users, "item": items})


def markov(samples: int, context: int, vocabulary: int, concentration: float, data_seed: int) -> Arrays:
    """Independent windows of a first-order Markov chain, each started from its stationary distribution.

    `tokens` uint16 [context + 1]; the rows of the transition matrix are symmetric Dirichlet(concentration).
    """
    random = np.random.default_rng(data_seed)
    transition = _transition(vocabulary, concentration, random)
    cumulative = np.cumsum(transition, axis=1)
    state = random.choice(vocabulary, samples, p=_stationary(transition))
    tokens = np.empty((samples, context + 1), np.uint16)
    tokens[:, 0] = state
    for t in range(1, context + 1):
        draw = random.random(samples)
        state = np.minimum((cumulative[state] < draw[:, None]).sum(axis=1), vocabulary - 1)
        tokens[:, t] = state
    return Arrays({"tokens": tokens}, vocabulary=vocabulary)


def markov_best_loss(vocabulary: int, concentration: float, data_seed: int) -> float:
    """Entropy rate of the chain of `markov`, nats per token."""
    transition = _transition(vocabulary, concentration, np.random.default_rng(data_seed))
    surprise = -np.log(np.where(transition > 0, transition, 1.0))
    return float(_stationary(transition) @ (transition * surprise).sum(axis=1))


def _transition(vocabulary: int, concentration: float, random: np.random.Generator) -> np.ndarray:
    rows = random.dirichlet(np.full(vocabulary, concentration), vocabulary)
    return 0.99 * rows + 0.01 / vocabulary  # every token reachable, so that the chain has one stationary law


def _stationary(transition: np.ndarray) -> np.ndarray:
    size = len(transition)
    equations = np.vstack([transition.T - np.eye(size), np.ones(size)])
    distribution = np.linalg.lstsq(equations, np.r_[np.zeros(size), 1.0], rcond=None)[0]
    return np.maximum(distribution, 0) / np.maximum(distribution, 0).sum()
