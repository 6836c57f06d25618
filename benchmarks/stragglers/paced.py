"""A small model of which every process takes its own time: its gradient lasts so long a sample, by sleeping."""

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.data.source import Feature
from jaxdist.models.losses import classification
from jaxdist.models.mlp import MLP
from jaxdist.task import Batch, ModuleTask


def paced_mlp(
    hidden: int, seconds_a_sample: float, slow: float, features: dict[str, Feature], classes: int
) -> ModuleTask:
    """An MLP whose gradient, not its evaluation, takes `seconds_a_sample`, and in worker 0 `slow` times as long.

    It sleeps inside the step, since a loader would read ahead of a slow source; and asleep, more workers than cores
    do not disturb each other.
    """
    slower = slow if os.environ.get("JAXDIST_ROLE_INDEX") == "0" else 1.0

    def wait(ids: np.ndarray) -> np.ndarray:
        time.sleep(seconds_a_sample * slower * len(ids))
        return np.zeros((), np.float32)

    def loss(model: MLP, batch: Batch, key: jax.Array | None) -> Any:
        x = batch["x"]
        if key is not None:
            x = x + jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), batch["sample_id"])
        return classification(model(x), batch["y"], batch["weight"])

    return ModuleTask(
        lambda rngs: MLP(math.prod(features["x"].shape), [hidden], classes, rngs=rngs),
        loss,
        lambda model, batch: model(batch["x"]),
    )
