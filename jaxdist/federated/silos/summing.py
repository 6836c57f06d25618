"""The server's numbers: from the uploads of a round, or from their sum, to the next global parameters. What adds them
up is the engine of the simulation, in the same lanes and the same order."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxdist.federated.engine import Carry, Engine
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Segment, Work
from jaxdist.federated.silos.rules import Arrays
from jaxdist.federated.silos.words import Sum
from jaxdist.federated.state import FederatedState


@dataclass(frozen=True)
class WithoutClients(Engine):
    """What clients keep is with them: the state has none of it."""

    def initial_state(self, params: Any, model_state: Any) -> FederatedState:
        return dataclasses.replace(super().initial_state(params, model_state), client_state=())

    def _first_upload(self, state: FederatedState) -> Any:
        own = self.trainer.initial_state(state.params, state.model_state)
        return self._upload_of_nobody(state, self._global(state), own)


@dataclass(frozen=True)
class Summing:
    """On a mesh of one device.

    Args:
      state: as ShapeDtypeStructs with shardings.
      upload: as the server makes it of what a client sends, a tree of ShapeDtypeStruct.
    """

    engine: WithoutClients
    state: FederatedState
    upload: Any

    @property
    def num_losses(self) -> int:
        return 2 + len(self.engine.trainer.metric_names)

    @property
    def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the arrays of an update."""
        losses = jax.ShapeDtypeStruct((self.num_losses,), self._dtype)
        return (*jax.tree.leaves(self._wide), losses)

    @property
    def _dtype(self) -> Any:
        """Of sums over losses."""
        return jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(self.state.params)))

    @property
    def _wide(self) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32)), self.upload
        )

    def of_updates(
        self, state: FederatedState, work: Work, updates: Mapping[int, Arrays]
    ) -> tuple[FederatedState, np.ndarray]:
        """(the next state, the engine's measurements). `work`: of those clients."""
        num_slots = self.engine.num_slots
        rows = [np.zeros((num_slots, *x.shape), x.dtype) for x in self.specs]
        num_samples, draws = np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32)
        num_samples[work.slots], draws[work.slots] = work.num_samples, 1
        for slot in work.slots:
            for row, array in zip(rows, updates[int(work.clients[slot])], strict=True):
                row[slot] = array
        uploads = jax.tree.unflatten(jax.tree.structure(self.upload), rows[:-1])
        return self._measured(self.step(state, uploads, rows[-1], work.clients, num_samples, draws))

    def of_total(self, state: FederatedState, total: Sum, num_clients: int) -> tuple[FederatedState, np.ndarray]:
        """The same of the sum of so many clients' words; of none, the next round begins as this did."""
        loss, *metrics = total.measured
        sums = np.array([total.weight, np.nan, num_clients, 0, loss, 1, *metrics], self._dtype)
        return self._measured(self.step(state, total.limbs, sums))

    def nothing(self) -> Sum:
        """The sum of no clients."""
        secure = self.engine.secure
        assert secure is not None
        limbs = jax.tree.map(lambda x: np.zeros((secure.num_limbs, *x.shape), np.int32), self.upload)
        return Sum(limbs, np.full(self.num_losses - 1, np.nan), 0)

    def lower(self) -> jax.stages.Lowered:
        """What becomes of a round's uploads."""
        all_, num_slots = PartitionSpec(), self.engine.num_slots
        inside = self._of_updates if self.engine.secure is None else self._of_total
        body = jax.shard_map(inside, mesh=self.engine.mesh, in_specs=all_, out_specs=all_, check_vma=False)
        if self.engine.secure is not None:
            sums = jax.ShapeDtypeStruct((4 + self.num_losses,), self._dtype)
            return jax.jit(body).lower(self.state, self.nothing().limbs, sums)
        rows = [jax.ShapeDtypeStruct((num_slots, *x.shape), x.dtype) for x in self.specs]
        uploads = jax.tree.unflatten(jax.tree.structure(self.upload), rows[:-1])
        ints = jax.ShapeDtypeStruct((num_slots,), np.int32)
        return jax.jit(body).lower(self.state, uploads, rows[-1], ints, ints, ints)

    @cached_property
    def step(self) -> jax.stages.Compiled:
        return self.lower().compile()

    def compile_for(self, begins: bool, last: bool) -> None:
        """What a round needs, see federated.programs."""
        _ = self.step

    def _measured(self, out: tuple[FederatedState, jax.Array]) -> tuple[FederatedState, np.ndarray]:
        state, metrics = out
        return state, np.asarray(metrics)

    def _empty(self, uploads: Any) -> Carry:
        engine = self.engine
        assert engine.mesh.shape[CLIENTS] == 1
        sums = jnp.zeros((engine.num_lanes, 4 + self.num_losses), self._dtype)
        return Carry(None, uploads, jnp.zeros(engine.num_slots, self._dtype), sums, ())  # type: ignore[arg-type]

    def _of_updates(
        self, state: FederatedState, uploads: Any, losses: jax.Array, clients: Any, num_samples: Any, draws: Any
    ) -> tuple[FederatedState, jax.Array]:
        engine = self.engine
        lead = engine.num_slots if engine.aggregate else engine.num_lanes
        carry = self._empty(jax.tree.map(lambda x: jnp.zeros((lead, *x.shape[1:]), x.dtype), uploads))

        def add(slot: Any, carry: Carry) -> Carry:
            nobody = Segment(*[jnp.zeros((), jnp.int32)] * len(Segment._fields))
            now = nobody._replace(slot=slot, client=clients[slot], num_samples=num_samples[slot], draws=draws[slot])
            upload = jax.tree.map(lambda x: x[slot], uploads)
            return engine.add(carry, upload, jnp.bool_(True), losses[slot], now, state)[0]

        carry = jax.lax.fori_loop(0, engine.num_slots, add, carry)
        return engine.finish(state, carry, self._rate(state))

    def _of_total(self, state: FederatedState, limbs: Any, sums: jax.Array) -> tuple[FederatedState, jax.Array]:
        lanes = self.engine.num_lanes
        carry = self._empty(jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype).at[0].set(x), limbs))
        return self.engine.finish(state, carry._replace(sums=carry.sums.at[0].set(sums)), self._rate(state))

    def _rate(self, state: FederatedState) -> jax.Array:
        return jnp.asarray(self.engine.schedule(state.step), jnp.result_type(float))
