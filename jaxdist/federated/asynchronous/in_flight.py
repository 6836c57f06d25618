"""Messages that wait: trained when their client started, kept until a step of the server takes them.

S slots of a dispatch, R rows in flight, K slots of a step.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.federated.engine import Carry, Engine
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.state import FederatedState


class InFlight(NamedTuple):
    """Leaves [R, ...], split over the axis `clients`."""

    uploads: Any  # {"message", "model_state": how it changed}; where steps move by mixing, the client's own of both
    weights: jax.Array  # [R]
    sums: jax.Array  # [R, ...]: see engine.Carry


@dataclass(frozen=True)
class Landing:
    """What becomes of trained clients' messages.

    Args:
      training: trains clients from one version; one client in a lane, and all messages kept.
      adding: its lanes are those along which a step of the server adds up.
      num_rows: R, a multiple of the lanes.
      mixes: messages are taken relative to the parameters that they meet, not to those that they started from.
    """

    training: Engine
    adding: Engine
    num_rows: int
    mixes: bool

    def empty(self, carry: Any) -> InFlight:
        """`carry`: of `training`, as ShapeDtypeStructs."""
        return jax.tree.map(lambda x: jnp.zeros((self.num_rows, *x.shape[2:]), x.dtype), _kept(carry))

    def collect(self, state: FederatedState, carry: Carry, clients: jax.Array, places_S: jax.Array) -> FederatedState:
        """Messages into their rows, and what clients keep back to them. `state` is what they started from."""
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (_kept(carry), carry.client_state))
        kept, own = rows
        if self.mixes:
            kept = kept._replace(uploads=self._own(state, kept.uploads))
        in_flight = jax.tree.map(lambda x, row: x.at[places_S].set(row, mode="drop"), state.in_flight, kept)
        return dataclasses.replace(
            state,
            in_flight=jax.lax.with_sharding_constraint(in_flight, self._split),
            client_state=self.training.scattered(state.client_state, own, clients),
        )

    def step(
        self, state: FederatedState, order_K: jax.Array, factors_K: jax.Array, votes: jax.Array
    ) -> tuple[FederatedState, jax.Array]:
        """The server's, of the messages in rows `order_K`, each times its factor: (state, metrics)."""
        rows = jax.tree.map(lambda x: x.at[order_K].get(mode="fill", fill_value=0), state.in_flight)
        rows = jax.lax.with_sharding_constraint(rows, self._split)
        mine, all_ = PartitionSpec(CLIENTS), PartitionSpec()
        body = jax.shard_map(
            self._on_device,
            mesh=self.adding.mesh,
            in_specs=(all_, mine, mine, mine),
            out_specs=(all_, all_),
            check_vma=False,
        )
        new, metrics = body(dataclasses.replace(state, client_state=None, in_flight=()), rows, factors_K, votes)
        return dataclasses.replace(new, client_state=state.client_state, in_flight=state.in_flight), metrics

    @property
    def _split(self) -> NamedSharding:
        return NamedSharding(self.adding.mesh, PartitionSpec(CLIENTS))

    def _own(self, state: FederatedState, upload: Any) -> Any:
        """From x - y and the change of the model state to the client's own y and model state."""
        shared = self.adding.trainer.shared
        return {
            "message": jax.tree.map(jnp.subtract, shared(state.params), upload["message"]),
            "model_state": jax.tree.map(jnp.add, shared(state.model_state), upload["model_state"]),
        }

    def _relative(self, state: FederatedState, own: Any) -> Any:
        """And back, to those of another state."""
        shared = self.adding.trainer.shared
        return {
            "message": jax.tree.map(jnp.subtract, shared(state.params), own["message"]),
            "model_state": jax.tree.map(jnp.subtract, own["model_state"], shared(state.model_state)),
        }

    def _on_device(
        self, state: FederatedState, rows: InFlight, factors: jax.Array, votes: jax.Array
    ) -> tuple[FederatedState, jax.Array]:
        engine = self.adding
        lanes = engine.num_lanes // engine.mesh.size

        def add(i: Any, carry: Carry) -> Carry:
            upload, weight, numbers = jax.tree.map(lambda x: x[i], rows)
            if self.mixes:
                upload = self._relative(state, upload)
            scale = weight * factors[i].astype(weight.dtype)
            # The length of a message is that of which it counts.
            squared = scale * factors[i] * optax.tree.norm(upload["message"], squared=True)
            numbers = jnp.concatenate([numbers[:1], squared[None].astype(numbers.dtype), numbers[2:]])
            lane = i // engine.slots_per_lane
            return carry._replace(
                uploads=jax.tree.map(lambda sums, x: sums.at[lane].add(scale * x), carry.uploads, upload),
                sums=carry.sums.at[lane].add(numbers),
            )

        def nothing(x: jax.Array) -> jax.Array:
            return jnp.zeros((lanes, *x.shape[1:]), x.dtype)

        empty = Carry(
            local=None,  # type: ignore[arg-type]
            uploads=jax.tree.map(nothing, rows.uploads),
            weights=rows.weights,
            sums=nothing(rows.sums),
            client_state=None,  # type: ignore[arg-type]
        )
        carry = jax.lax.fori_loop(0, len(rows.weights), add, empty)
        rate = jnp.asarray(engine.schedule(state.step), jnp.result_type(float))
        new, metrics = engine.finish(state, carry, rate)
        return new, jnp.concatenate([metrics, jax.lax.psum(votes[0], CLIENTS)])


def _kept(carry: Any) -> InFlight:
    return InFlight(carry.uploads, carry.weights, carry.sums)
