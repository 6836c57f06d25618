"""jaxdist's side: the step that `jaxdist train` compiles, on batches that are on the devices already.

python jaxdist_steps.py gpt|cnn [a.b=value ...]
"""

import os
import sys
import time
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from contender import Case, claim_stdout, serve
from jaxdist_operations import operations

from jaxdist.config.load import load
from jaxdist.data.arrays import Arrays
from jaxdist.data.build import Data, streams
from jaxdist.data.placement import Placement
from jaxdist.mesh import num_workers, per_worker
from jaxdist.run import Built, build
from jaxdist.sync.loop import VOTES


def config(model: str) -> dict[str, Any]:
    """As a user would write it; the blocks' own defaults hold where nothing is said."""
    block = {"kind": "transformer", **cases.GPT} if model == "gpt" else {"kind": "cnn", **cases.CNN}
    decay = cases.ADAM["weight_decay"] if model == "gpt" else 0.0
    return {
        "name": model,
        "model": block,
        "optimizer": {"kind": "adamw", **cases.ADAM, "weight_decay": decay},
        "train": {"global_batch_size": cases.BATCH[model]},
    }


def data(model: str) -> Data:
    fields = {name: np.concatenate([b[name] for b in cases.batches(model)]) for name in cases.batches(model)[0]}
    known = {"vocabulary": cases.VOCABULARY} if model == "gpt" else {"classes": cases.CLASSES}
    return streams(Arrays(fields, **known), None, 0.1, seed=0)


def build_run(settings: dict[str, Any], overrides: list[str], data: Data) -> Built:
    return build(load(settings, overrides, ("data",)).config, data=data)


def placed(built: Built, batches: list[dict[str, np.ndarray]]) -> list[Any]:
    """Global batches on the devices, each process with its own rows."""
    strategy: Any = built.strategy
    train, abstract = built.config.train, strategy.abstract_batch()
    placement = Placement(strategy.batch_sharding, train.global_batch_size, train.accumulation_steps)
    ready = []
    for number, batch in enumerate(batches):
        rows = np.arange(train.global_batch_size)
        whole = {**batch, "sample_id": number * len(rows) + rows, "weight": np.ones(len(rows))}
        ready.append(placement.put({k: whole[k][placement.local_rows].astype(v.dtype) for k, v in abstract.items()}))
    return ready


def no_votes(built: Built) -> jax.Array:
    mesh = built.strategy.mesh  # type: ignore[attr-defined]
    zeros = jnp.zeros((num_workers(mesh), len(VOTES)), jnp.float32)
    return jax.jit(lambda: zeros, out_shardings=per_worker(mesh))()


def step_case(built: Built, batches: list[dict[str, np.ndarray]]) -> Case:
    """Steps from fresh parameters on; each call goes on where the last one ended."""
    step = built.strategy.lower().compile()
    ready, votes = placed(built, batches), no_votes(built)
    loss = built.strategy.functions.names.index("loss")  # type: ignore[attr-defined]
    state = built.strategy.init_state()

    def run(steps: int) -> tuple[float, float]:
        nonlocal state
        started = time.perf_counter()
        for number in range(steps):
            state, metrics = step(state, ready[number % len(ready)], votes)
        jax.block_until_ready(state)
        return (time.perf_counter() - started) / steps, float(np.asarray(metrics)[loss])

    return run


def main() -> None:
    answers = claim_stdout()
    model, *overrides = sys.argv[1:]
    built = build_run(config(model), overrides, data(model))
    about = {"jax": jax.__version__, "threads": len(os.sched_getaffinity(0)), "devices": len(built.topology.devices)}
    known = {"step": step_case(built, cases.batches(model))}
    if model == "gpt" and len(built.topology.devices) == 1:
        known |= operations(built.task, built.strategy.optimizer)  # type: ignore[attr-defined]
    serve(answers, about, known)


if __name__ == "__main__":
    main()
