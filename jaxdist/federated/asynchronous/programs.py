"""The compiled programs of asynchronous rounds: clients train, their messages wait, the server steps."""

import dataclasses
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.federated.asynchronous.in_flight import Landing
from jaxdist.federated.feed import Dispatch
from jaxdist.federated.programs import Programs
from jaxdist.federated.state import FederatedState


class AsynchronousPrograms:
    """Compiled when they are first needed.

    Args:
      training: of the engine that `landing` trains with.
      state: as ShapeDtypeStructs with shardings, messages in flight among it.
    """

    def __init__(self, landing: Landing, training: Programs, state: FederatedState):
        self._landing, self._training, self._state = landing, training, state

    def lower(self) -> jax.stages.Lowered:
        """Of clients that train at once."""
        return self._training.lower(begins=True, ends=False)

    def compile_for(self, begins: bool, last: bool) -> None:
        """What a dispatch needs, the first or the last of those that start at once."""
        self._training.get(begins, False)
        if last:
            _ = self._collect, self._step

    def run(self, now: Dispatch, state: FederatedState, carry: Any, votes: jax.Array) -> Any:
        """(state, metrics) where a step of the server is made, else a carry."""
        state, carry = (state, None) if carry is None else carry
        trained = dataclasses.replace(state, in_flight=())
        train = self._training.get(now.begins, False)
        carry = train(trained, carry, now.data, now.chunk, now.clients, votes)
        if not now.last:
            return state, carry
        state = self._collect(state, carry, now.clients, now.lands.places)
        if not now.ends:
            return state, None
        return self._step(state, now.lands.order, now.lands.factors, votes)

    @cached_property
    def _collect(self) -> jax.stages.Compiled:
        collect = jax.jit(self._landing.collect, donate_argnums=0, out_shardings=self._shardings)
        places = self._whole(self._landing.training.num_slots, "int32")
        return collect.lower(self._state, self._training.carry, self._training.clients, places).compile()

    @cached_property
    def _step(self) -> jax.stages.Compiled:
        all_ = NamedSharding(self._landing.adding.mesh, PartitionSpec())
        step = jax.jit(self._landing.step, donate_argnums=0, out_shardings=(self._shardings, all_))
        slots = self._landing.adding.num_slots
        order, factors = self._whole(slots, "int32"), self._whole(slots, "float32")
        return step.lower(self._state, order, factors, self._training.votes).compile()

    @property
    def _shardings(self) -> FederatedState:
        return jax.tree.map(lambda x: x.sharding, self._state)

    def _whole(self, size: int, dtype: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self._landing.adding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((size,), dtype, sharding=sharding)
