"""Small federations for tests: tasks with closed forms, an engine without a run around it, plain NumPy references."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from jaxdist.data.arrays import Arrays
from jaxdist.federated.algorithm import Algorithm
from jaxdist.federated.client import Trainer
from jaxdist.federated.cohort import Cohort, uniform
from jaxdist.federated.engine import Engine
from jaxdist.federated.feed import Feed, rounds_of
from jaxdist.federated.schedule import Plan


@dataclass(frozen=True)
class LeastSquares:
    """1/2 (a x - b)^2 of each sample, summed over d coordinates: fields a, b [d]."""

    dimensions: int

    def init(self, key: Any) -> Any:
        return {"x": jnp.zeros(self.dimensions)}, {}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        errors = 0.5 * jnp.sum((batch["a"] * params["x"] - batch["b"]) ** 2, axis=-1)
        return jnp.sum(batch["weight"] * errors), jnp.sum(batch["weight"]), ({}, model_state)


@dataclass(frozen=True)
class Perceptron:
    """Six features, eight hidden units, three classes; noise from the key, and a running mean as model state."""

    def init(self, key: Any) -> Any:
        params = {
            "hidden": {"kernel": 0.3 * jax.random.normal(key, (6, 8))},
            "out": {"kernel": 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (8, 3)), "bias": jnp.zeros(3)},
        }
        return params, {"mean": jnp.zeros(6)}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        x, weight = batch["x"], batch["weight"]
        noise = 1.0 if key is None else jax.random.uniform(key, minval=0.5, maxval=1.5)
        hidden = jnp.tanh(noise * (x - model_state["mean"]) @ params["hidden"]["kernel"])
        logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
        one_hot = jax.nn.one_hot(batch["y"], 3)
        losses = jax.nn.logsumexp(logits, -1) - jnp.sum(one_hot * logits, -1)
        correct = jnp.argmax(logits, -1) == batch["y"]
        mean = 0.9 * model_state["mean"] + 0.02 * (weight @ x)
        return jnp.sum(weight * losses), weight.sum(), ({"accuracy": jnp.sum(weight * correct)}, {"mean": mean})


@dataclass
class Federation:
    """A few clients with their samples, and an engine that trains them; `state` goes on."""

    engine: Engine
    feed: Feed
    state: Any
    programs: dict[tuple[bool, bool], Any]
    traces: list[tuple[bool, bool]]
    metrics: dict[str, float]

    def rounds(self, count: int) -> Any:
        """The state after so many more."""
        start, carry = int(self.state.step), None
        votes = np.zeros((self.engine.mesh.size, 1), np.float32)
        for now in self.feed.dispatches(start, start + count):
            program = self.programs.setdefault((now.begins, now.ends), self._jit(now.begins, now.ends))
            out = program(self.state, carry, now.data, now.chunk, now.clients, votes)
            carry = out
            if now.ends:
                carry, (self.state, measured) = None, out
                self.metrics = dict(zip((*self.engine.names, "votes"), np.asarray(measured).tolist(), strict=True))
        return self.state

    def _jit(self, begins: bool, ends: bool) -> Any:
        program = self.engine.program(begins, ends)

        def traced(*arguments: Any) -> Any:
            self.traces.append((begins, ends))
            return program(*arguments)

        return jax.jit(traced)


def federation(
    task: Any,
    clients: Sequence[dict[str, np.ndarray]],
    algorithm: Algorithm,
    *,
    rate: float | Callable[[Any], Any] = 0.1,
    batch_size: int = 1000,
    epochs: int | None = 1,
    steps: int | None = None,
    cohort: int | None = None,
    cohorts: Callable[[int], Cohort] | None = None,
    devices: int = 1,
    capacity: int = 64,
    resident: bool = True,
    outer: optax.GradientTransformation | None = None,
    optimizer: Callable[[Any], Any] = optax.sgd,
    personal: tuple[str, ...] = (),
    lanes: int = 8,
    seed: int = 0,
    metric_names: tuple[str, ...] = (),
    **of_engine: Any,
) -> Federation:
    sizes = [len(next(iter(own.values()))) for own in clients]
    fields = {name: np.concatenate([own[name] for own in clients]) for name in clients[0]}
    size = cohort or len(clients)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("clients",), axis_types=(AxisType.Auto,))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    plan = Plan(seed, offsets, batch_size, epochs, steps, lanes, size, algorithm.needs_start_loss)

    source = Arrays(fields)
    ids = np.arange(len(source))
    drawn = rounds_of(cohorts or (lambda r: Cohort(uniform(seed, r, len(clients), size))))
    feed = Feed(plan, drawn, source, ids, mesh, capacity, resident)
    trainer = Trainer(task, algorithm, optimizer, personal, metric_names)
    schedule = rate if callable(rate) else lambda round_: rate
    engine = Engine(
        trainer, schedule, outer or optax.sgd(1.0), mesh, len(clients), lanes, plan.slots_per_lane, seed, resident,
        **of_engine,
    )  # fmt: skip
    if engine.by_samples:
        engine = dataclasses.replace(engine, total_weight=sum(sizes))
    state = engine.initial_state(*task.init(jax.random.key(seed)))
    return Federation(engine, feed, state, {}, [], {})


def quadratics(num_clients: int, dimensions: int, seed: int = 0, samples: int = 1) -> list[dict[str, np.ndarray]]:
    """Clients with curvatures and minima of their own."""
    draw = np.random.default_rng(seed)
    shape = (samples, dimensions)
    return [{"a": draw.uniform(0.5, 1.5, shape), "b": draw.normal(size=shape)} for _ in range(num_clients)]
