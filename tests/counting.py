"""A task that counts: each sample's gradient is one at its own place, so that with SGD of learning rate 1 the
parameters say how often each sample was applied, exactly. For tests of what servers and workers survive."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.data.arrays import Arrays

NUM_SAMPLES, ROWS = 256, 4  # a parameter of [4, 64] is two leaves of [2, 64]


class Counting:
    """Parameters: minus the number of times that each sample was applied, over the batch size."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        del key
        half = jnp.zeros((ROWS // 2, NUM_SAMPLES // ROWS))
        return {"a": {"kernel": half}, "b": {"kernel": jnp.zeros_like(half)}}, {}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        whole = jnp.concatenate([params["a"]["kernel"].ravel(), params["b"]["kernel"].ravel()])
        picked = whole[batch["sample_id"]] * batch["weight"]
        return picked.sum(), batch["weight"].sum(), ({}, model_state)

    def predict(self, params: Any, model_state: Any, batch: Any) -> Any:
        del model_state, batch
        return params["a"]["kernel"]


class Slow(Arrays):
    """Each read takes `pause` seconds: a run that lasts long enough to be hurt."""

    pause = 0.0

    def get(self, ids: np.ndarray) -> Any:
        time.sleep(self.pause)
        return super().get(ids)


def task(**_: Any) -> Counting:
    return Counting()


def data(pause: float = 0.0) -> Arrays:
    slow = Slow({"x": np.zeros((NUM_SAMPLES, 1), np.float32)})
    slow.pause = pause
    return slow


def applied(params: Any, batch_size: int) -> np.ndarray:
    """[NUM_SAMPLES] int: how often each sample was applied. Batches whose size is a power of two divide exactly."""
    whole = np.concatenate([np.asarray(params[name]["kernel"]).ravel() for name in ("a", "b")])
    counts = -whole * batch_size
    assert np.array_equal(counts, np.round(counts)), "not a whole number of times"
    return counts.astype(int)


def stream() -> Any:
    """In the order in which a run of seed 0 goes through the samples."""
    from jaxdist.config.data import DataTarget
    from jaxdist.data.build import build_data

    return build_data(DataTarget(target="counting:data"), seed=0).train
