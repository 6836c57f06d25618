"""Matrix factorisation of ratings. B samples, K rank."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.models.vocabulary import lookup


class Table(nnx.Module):
    """What is learnt of each of `count` users or items: a vector and a bias."""

    def __init__(self, count: int, rank: int, *, rngs: nnx.Rngs):
        # Products of two vectors begin with a standard deviation of 0.1.
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (count, rank)) * math.sqrt(0.1 / math.sqrt(rank)))
        self.bias = nnx.Param(jnp.zeros(count))


class Factorization(nnx.Module):
    """The rating of an item by a user is predicted as mean + b_u + b_i + p_u . q_i (Koren, Bell & Volinsky 2009,
    "Matrix factorization techniques for recommender systems", equation 4)."""

    sharding_rules = ((r"embedding$", ("fsdp", None)),)
    sparse_rows = {  # noqa: RUF012 - nnx takes annotations for its own
        f"{field}/{name}": field for field in ("user", "item") for name in ("embedding", "bias")
    }

    def __init__(self, users: int, items: int, rank: int, *, rngs: nnx.Rngs):
        self.user = Table(users, rank, rngs=rngs)
        self.item = Table(items, rank, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros(()))

    def __call__(self, user_B: jax.Array, item_B: jax.Array) -> jax.Array:
        p_BxK = lookup(self.user.embedding[...], user_B)
        q_BxK = lookup(self.item.embedding[...], item_B)
        biases_B = lookup(self.user.bias[...], user_B) + lookup(self.item.bias[...], item_B)
        return self.mean[...] + biases_B + jnp.sum(p_BxK * q_BxK, axis=-1)
