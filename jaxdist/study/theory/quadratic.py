"""Quadratics as a task, and the synchronous step on them.

N quadratics, R independent runs at once, D dimensions, W workers, B samples of all workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.codecs.codec import Codec
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import Feedback, NoFeedback
from jaxdist.config.errors import UserError
from jaxdist.mesh import build_mesh
from jaxdist.optimizer import Schedule, build_optimizer
from jaxdist.randomness import sample_keys
from jaxdist.sync.aggregate import Aggregator, Mean
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.state import TrainState, initial_guard
from jaxdist.sync.step import build_step
from jaxdist.task import Batch, Loss, leaf_metadata

NO_FEEDBACK = NoFeedback()
WORKERS = 4  # as many devices as any check needs


@dataclass(frozen=True, eq=False)
class Quadratics:
    """A Task: sample i has the loss 1/2 (x - c)^T H (x - c) + z^T x, with H and c those of i modulo N.

    z is normal, with the standard deviations `noise_D` in its dimensions, and drawn at every step for every sample
    id and run. A start of R rows is R runs: no gradient of one depends on another, so that they cost one.
    """

    hessians_NxDxD: Any
    optima_NxD: Any
    start_RxD: Any
    noise_D: Any = None

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        del key
        return {"x": jnp.asarray(self.start_RxD)}, {}

    def loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Loss:
        which, weight_B = batch["sample_id"] % len(self.hessians_NxDxD), batch["weight"]
        x_RxD = params["x"]
        from_optimum_BxRxD = x_RxD - jnp.asarray(self.optima_NxD)[which][:, None]
        hessian_BxDxD = jnp.asarray(self.hessians_NxDxD)[which]
        pulled_BxRxD = jnp.einsum("bde,bre->brd", hessian_BxDxD, from_optimum_BxRxD)
        loss_B = jnp.sum(from_optimum_BxRxD * pulled_BxRxD, (1, 2)) / 2
        if self.noise_D is not None and key is not None:
            draw = lambda key: jax.random.normal(key, x_RxD.shape, jnp.float32)  # noqa: E731 - half the time
            z_BxRxD = jax.vmap(draw)(sample_keys(key, batch["sample_id"])) * jnp.asarray(self.noise_D)
            loss_B = loss_B + jnp.sum(z_BxRxD * x_RxD, (1, 2))
        return jnp.sum(weight_B * loss_B), jnp.sum(weight_B), ({}, model_state)

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        del model_state
        return jnp.broadcast_to(params["x"], (len(batch["sample_id"]), *params["x"].shape))


def noisy(eigenvalues: Any, noise: Any, runs: int) -> Quadratics:
    """`runs` runs from the optimum of one quadratic with these eigenvalues along the axes, and noise along them."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    zero = np.zeros((1, len(eigenvalues)))
    return Quadratics(np.diag(eigenvalues)[None], zero, np.broadcast_to(zero, (runs, len(eigenvalues))), noise)


def through(
    codec: Codec,
    task: Quadratics,
    workers: int,
    feedback: Feedback = NO_FEEDBACK,
    join: type[Compression] = Compression,
) -> CompressedMean:
    """The aggregator of `train` that sends gradients through a codec."""
    params, _ = task.init(jax.random.key(0))
    spec = jax.ShapeDtypeStruct(params["x"].shape, params["x"].dtype)
    remembers = () if isinstance(feedback, NoFeedback) else (True,)
    compression = join((codec,), (spec,), workers, feedback, remembers)
    return CompressedMean({"codec": compression}, "codec", leaf_metadata(task, params), 1, 1, seed=0)


def train(
    task: Quadratics,
    optimizer: Any,
    schedule: Schedule,
    *,
    steps: int,
    workers: int = 1,
    weight_B: Any = (1.0,),
    aggregator: Aggregator | None = None,
    observe: Callable[[jax.Array], Any] = lambda x_RxD: x_RxD[0],
    health: bool = False,
    seed: int = 0,
) -> tuple[TrainState, np.ndarray, dict[str, np.ndarray]]:
    """Steps of `jaxdist.sync.step` in one program: (last state, [T, ...] what `observe` saw, metrics by name [T]).

    Args:
      optimizer: a block of `jaxdist.config.optimizer`; its learning rate is `schedule`.
      weight_B: of the samples of one step, which all workers share alike; their ids are 0 to B - 1. Parameters are
        exact to float64 if the sum is a power of two: the step keeps one over it in float32.
      observe: of the parameters before each step.
      health: also measure what `telemetry.health` does.

    Raises:
      UserError: if this process has fewer CPU devices than `workers`.
    """
    devices = jax.devices("cpu")
    if len(devices) < workers:
        raise UserError(
            f"theory: needs {WORKERS} CPU devices, this process has {len(devices)}; run `jaxdist theory` in a shell, "
            f"or set JAX_NUM_CPU_DEVICES={WORKERS} before jax is imported"
        )
    mesh, aggregator = build_mesh({"data": workers}, devices[:workers]), aggregator or Mean()
    params, model_state = task.init(jax.random.key(seed))
    leaves = leaf_metadata(task, params)
    transform = build_optimizer(optimizer, schedule, leaves)
    functions = build_step(task, transform, schedule, aggregator, mesh, leaves, seed=seed, health=health)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), aggregator.init(params))
    state = TrainState(jnp.zeros((), jnp.int32), params, model_state, transform.init(params), own, initial_guard())
    ids_B = np.arange(len(weight_B), dtype=np.int32)
    batch = {"sample_id": ids_B[None], "weight": np.asarray(weight_B, np.float32)[None]}

    @jax.jit
    def run(state: TrainState, batch: Batch) -> Any:
        def step(state: TrainState, _: None) -> Any:
            seen = observe(state.params["x"])
            state, metrics = functions.step(state, batch, jnp.zeros((workers, 0)))
            return state, (seen, metrics)

        return jax.lax.scan(step, state, None, length=steps)

    state, (seen, metrics) = run(state, batch)
    return state, np.asarray(seen), dict(zip(functions.names, np.asarray(metrics).T, strict=True))
