"""One client's local training, on one device: as many steps as it has, in a loop whose length is no part of the
compiled program. B samples of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.federated import personal
from jaxdist.federated.algorithm import Algorithm, Finish, Start
from jaxdist.federated.schedule import Segment
from jaxdist.federated.state import ClientState
from jaxdist.task import Batch, Task, cast_inputs

Fetch = Callable[[Any], Batch]
"""Number of a step in a dispatch, counted on this device -> its batch."""


class Local(NamedTuple):
    """A client in the midst of its training."""

    params: Any
    model_state: Any
    opt_state: Any
    sums: jax.Array  # of loss, weight and metrics over its steps
    start_sums: jax.Array  # of loss and weight of the global model


class Global(NamedTuple):
    """What the server sends, and what is the same for all clients of a round."""

    params: Any  # whole: personal ones have their initial values
    model_state: Any
    broadcast: Any
    rate: jax.Array  # learning rate
    key: jax.Array  # of the round


@dataclass(frozen=True)
class Trainer:
    """How a client trains. `optimizer` makes the client's, of a learning rate; it starts anew in every round."""

    task: Task
    algorithm: Algorithm
    optimizer: Callable[[Any], optax.GradientTransformation]
    personal: tuple[str, ...]
    metric_names: tuple[str, ...]
    dtype: Any = None  # of compute; None: as the parameters are

    def shared(self, tree: Any) -> Any:
        """Without what is personal."""
        return personal.keep(tree, personal.mask(tree, self.personal), False)

    def own(self, tree: Any) -> Any:
        """What is personal, alone."""
        return personal.keep(tree, personal.mask(tree, self.personal), True)

    def initial_state(self, params: Any, model_state: Any) -> ClientState:
        """Of a client that has not taken part yet."""
        return ClientState(self.algorithm.client_state(self.shared(params)), self.own(params), self.own(model_state))

    def begin(self, given: Global, state: ClientState) -> Local:
        params = personal.join(self.shared(given.params), state.params)
        model_state = personal.join(self.shared(given.model_state), state.model_state)
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(params)))
        sums = jnp.zeros(2 + len(self.metric_names), dtype)
        return Local(params, model_state, self.optimizer(given.rate).init(params), sums, jnp.zeros(2, dtype))

    def start(self, given: Global, state: ClientState, segment: Segment) -> Start:
        num_samples = jnp.asarray(segment.num_samples, jnp.float32)
        return Start(self.shared(given.params), given.broadcast, state.algorithm, num_samples)

    def run(self, local: Local, given: Global, start: Start, segment: Segment, fetch: Fetch) -> Local:
        """The steps of a segment."""
        key = jax.random.fold_in(given.key, segment.client)

        def train(i: Any, local: Local) -> Local:
            step = segment.step + i - segment.train
            return self._step(local, fetch(i), jax.random.fold_in(key, step), start, given.rate)

        def measure(i: Any, local: Local) -> Local:
            loss_sum, weight, _ = self._loss(local.params, local.model_state, fetch(i), None)
            return local._replace(start_sums=local.start_sums + jnp.stack([loss_sum, weight]))

        if self.algorithm.needs_start_loss:
            local = jax.lax.fori_loop(segment.start, segment.train, measure, local)
        return jax.lax.fori_loop(segment.train, segment.stop, train, local)

    def _step(self, local: Local, batch: Batch, key: jax.Array, start: Start, rate: jax.Array) -> Local:
        def mean_loss(params: Any) -> Any:
            loss_sum, weight, (metrics, model_state) = self._loss(params, local.model_state, batch, key)
            rows = [loss_sum, weight, *(metrics[name] for name in self.metric_names)]
            return loss_sum / weight, (jnp.stack([jnp.asarray(x, local.sums.dtype) for x in rows]), model_state)

        grads, (sums, model_state) = jax.grad(mean_loss, has_aux=True)(local.params)
        shared = self.algorithm.gradient(self.shared(grads), self.shared(local.params), start)
        grads = personal.join(shared, self.own(grads))
        updates, opt_state = self.optimizer(rate).update(grads, local.opt_state, local.params)
        params = optax.apply_updates(local.params, updates)
        return Local(params, model_state, opt_state, local.sums + sums, local.start_sums)

    def measure(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        """In evaluation, sums over a batch: of loss, weight, metrics; float32 [2 + metrics]."""
        loss_sum, weight, (metrics, _) = self._loss(params, model_state, batch, None)
        sums = [loss_sum, weight, *(metrics[name] for name in self.metric_names)]
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in sums])

    def _loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Any:
        def cast(x: jax.Array) -> jax.Array:
            return x.astype(self.dtype) if self.dtype and jnp.issubdtype(x.dtype, jnp.floating) else x

        return self.task.loss(jax.tree.map(cast, params), model_state, cast_inputs(batch, self.dtype), key)

    def end(self, local: Local, start: Start, segment: Segment, rate: jax.Array) -> tuple[Any, ClientState]:
        """(the algorithm's message, what the client keeps)."""
        num_steps = jnp.asarray(segment.num_steps, jnp.float32)
        start_loss = local.start_sums[0] / local.start_sums[1] if self.algorithm.needs_start_loss else jnp.nan
        finish = Finish(self.shared(local.params), num_steps, num_steps * rate, jnp.asarray(start_loss))
        message, kept = self.algorithm.client(start, finish)
        return message, ClientState(kept, self.own(local.params), self.own(local.model_state))
