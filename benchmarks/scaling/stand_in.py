"""A model whose computation takes a fixed time a sample, on any number of cores, and whose gradient has any size."""

import time

import jax
import jax.numpy as jnp
import numpy as np


class StandIn:
    """Task: `seconds_per_sample` of sleep in the forward pass; a gradient of `parameters` float32."""

    def __init__(self, parameters: int, seconds_per_sample: float):
        self.parameters, self.seconds_per_sample = parameters, seconds_per_sample

    def init(self, key):
        return {"w": jax.random.normal(key, (self.parameters,))}, {}

    def predict(self, params, model_state, batch):
        return batch["x"]

    def loss(self, params, model_state, batch, key):
        weight = jnp.sum(batch["weight"])
        pause = compute_for(self.seconds_per_sample * len(batch["weight"]), jax.lax.stop_gradient(weight))
        return weight * jnp.mean((params["w"] - 1 + pause) ** 2), weight, ({}, model_state)


def compute_for(seconds: float, after: jax.Array) -> jax.Array:
    """0, after so many seconds."""

    def sleep(_):
        time.sleep(seconds)
        return np.float32(0)

    return jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.float32), after)
