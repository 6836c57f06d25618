"""What embedding, blocks and head take on this machine: time for the balance of stages to go by."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.chain import split
from jaxdist.leaves import is_stacked
from jaxdist.randomness import key_for
from jaxdist.sync.pipeline.layout import take_apart
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.task import cast_inputs

REPEATS = 7


def measured_costs(pipelined: Pipelined, stream: Any, samples: int, dtype: Any, seed: int) -> dict[str, Any]:
    """Seconds of embed, of each block and of the head, forward and backward on one microbatch: the least of
    REPEATS, as whatever else a machine does only adds.

    On one device, whole: what tensor would split is not. Args: stream: training data. samples: of a microbatch.
    """
    chain = pipelined.apart.chain
    params, state = pipelined.task.init(key_for(seed, "init"))
    rest, blocks = _parts(pipelined, params, dtype)
    states = state.get("blocks", {}) if isinstance(state, dict) else {}
    own = jax.tree.map(lambda x: x[0], states) if states and is_stacked(states) else states.get("0", {})
    batch = {n: jnp.asarray(x) for n, x in stream.at(0, samples).items()}
    batch, key = cast_inputs(batch, dtype), key_for(seed, "dropout")

    def ones_like(tree: Any) -> Any:
        return jax.tree.map(jnp.ones_like, tree)

    # The batch is an argument: a constant would be computed with while compiling.
    @jax.jit
    def embed(rest: Any, batch: Any) -> Any:
        x, vjp = jax.vjp(lambda rest: chain.embed(rest, batch, key), rest)
        return x, vjp(ones_like(x))

    @jax.jit
    def block(params: Any, x: Any, number: Any, batch: Any) -> Any:
        y, vjp = jax.vjp(lambda params, x: chain.block(params, own, x, number, batch, key)[0], params, x)
        return vjp(ones_like(y))

    @jax.jit
    def head(rest: Any, x: Any, batch: Any) -> Any:
        loss, vjp = jax.vjp(lambda rest, x: chain.head(rest, x, batch)[0], rest, x)
        return vjp(jnp.ones_like(loss))

    x = embed(rest, batch)[0]
    calls: list[Callable[[], Any]] = [
        lambda: embed(rest, batch),
        *(lambda own=own, i=i: block(own, x, i, batch) for i, own in enumerate(blocks)),
        lambda: head(rest, x, batch),
    ]
    seconds = np.array([[_seconds(call) for call in calls] for _ in range(REPEATS + 1)])[1:]  # the first compiles
    first, *middle, last = map(float, seconds.min(axis=0))
    return {"embed": first, "blocks": middle, "head": last}


def _parts(pipelined: Pipelined, params: Any, dtype: Any) -> tuple[Any, list[Any]]:
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if "blocks" in params and is_stacked(params["blocks"]):
        rest, stack = split(params)
        return rest, [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(pipelined.apart.chain.num_blocks)]
    return take_apart(params, pipelined.apart.blocks)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
