"""A round as one compiled program: every device trains its clients back to back, with no padding between them.

D devices, L lanes of a device, S slots of a device, T steps of a dispatch, B samples of a step. A round that is
longer than one dispatch goes on in the next, the carry kept; so four programs at most serve all rounds: a whole one,
and the beginning, the middle and the end of a long one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.federated import personal
from jaxdist.federated.algorithm import Message, Start
from jaxdist.federated.client import Global, Local, Trainer
from jaxdist.federated.parcels import Downlink, Parcels
from jaxdist.federated.privacy.central import Central, Contribution
from jaxdist.federated.privacy.clip import clip
from jaxdist.federated.privacy.local import Local as LocalPrivacy
from jaxdist.federated.reduce import CLIENTS, sum_of_lanes
from jaxdist.federated.schedule import Chunk, Segment
from jaxdist.federated.server import Server
from jaxdist.federated.state import ClientState, FederatedState
from jaxdist.federated.transmit import Transmit
from jaxdist.federated.whole_numbers import WholeNumbers
from jaxdist.optimizer import Schedule
from jaxdist.randomness import key_for
from jaxdist.task import Batch

Aggregate = Callable[[Any, jax.Array], Any]
"""Inside a manual region over `clients`: (uploads, leaves [S, ...]; weights float32 [S], 0 where a slot is empty) ->
one upload, the same on every device."""
OnMessage = Callable[[Message, jax.Array, jax.Array], Message]
"""At the client, before its message leaves it: (message, key of round and client, client's number) -> message."""
OnBatch = Callable[[Batch, jax.Array], Batch]
"""(a client's batch, client's number) -> what it trains on."""
Received = Callable[[Message, Message], Message]
"""(a message as it came, last round's mean) -> what is aggregated."""
Data = dict[str, jax.Array]
"""Fields, `sample_id` among them: [samples, ...] on every device, or [D, T, B, ...] where each has its own."""

COUNTS = ("clients", "nonfinite")  # of the cohort


class Carry(NamedTuple):
    """Of one device, between dispatches."""

    local: Local
    uploads: Any  # leaves [L, ...], weighted sums, or those of whole numbers; or [S, ...], each client's
    weights: jax.Array  # [S]
    sums: jax.Array  # [L, ...]: of weight, weighted squared norm; clients, those not finite; loss, weight, metrics
    client_state: ClientState  # leaves [S, ...]


@dataclass(frozen=True)
class Engine:
    """Rounds on a mesh of one axis, `clients`."""

    trainer: Trainer
    schedule: Schedule  # the clients' learning rate, by round
    outer_optimizer: optax.GradientTransformation
    mesh: Mesh
    num_clients: int  # with rows of client state
    num_lanes: int  # a multiple of the mesh's size
    slots_per_lane: int
    seed: int
    resident: bool  # the samples are on every device, and positions name their rows
    by_samples: bool = True  # a client counts as its samples do; else all alike
    aggregate: Aggregate | None = None  # None: the weighted mean, for which no device holds single messages
    on_batch: OnBatch | None = None
    on_message: tuple[OnMessage, ...] = ()
    on_receipt: Received | None = None
    keeps_mean: bool = False  # on_receipt looks at last round's mean
    skip_nonfinite: bool = False  # a message that is not finite is left out
    num_sampled_from: int | None = None  # clients that may be sampled; None: all
    total_weight: float | None = None  # of those; None: as many as they are
    transmit: Transmit | None = None  # None: messages are sent whole
    privacy: Central | LocalPrivacy | None = None
    parcels: Parcels | None = None  # None: messages travel as they are
    secure: WholeNumbers | None = None  # the server learns sums of whole numbers alone
    downlink: Downlink | None = None  # None: parameters travel as they are

    @property
    def server(self) -> Server:
        num_clients = self.num_sampled_from or self.num_clients
        total_weight = self.total_weight or num_clients
        return Server(self.trainer, self.outer_optimizer, num_clients, total_weight, self.keeps_mean)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what a round measures; after them come the votes."""
        return ("loss", *self.trainer.metric_names, "learning_rate", "client_drift", *COUNTS)

    @property
    def num_rows(self) -> int:
        """Of client state: clients, filled up so that any number of devices that divides the lanes splits them."""
        return -(-self.num_clients // self.num_lanes) * self.num_lanes

    @property
    def num_slots(self) -> int:
        return self.num_lanes * self.slots_per_lane

    def initial_state(self, params: Any, model_state: Any) -> FederatedState:
        trainer = self.trainer
        own, shared = trainer.initial_state(params, model_state), trainer.shared(params)
        if self.parcels is not None:
            own = dataclasses.replace(own, memory=self.parcels.init(key_for(self.seed, "codec")))
        state = FederatedState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            server_state=trainer.algorithm.server_state(shared),
            outer_opt_state=self.outer_optimizer.init(shared),
            last_mean=(),
            client_state=jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_rows, *x.shape)), own),
            privacy=self.privacy.init() if isinstance(self.privacy, Central) else (),
            residual=() if self.downlink is None else self.downlink.init(),
        )
        if not self.keeps_mean:
            return state
        message = jax.eval_shape(self._first_upload, state)["message"]
        return dataclasses.replace(state, last_mean=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), message))

    def upload(self, state: Any) -> Any:
        """What the server makes of what a client sends, as ShapeDtypeStructs: its message, how its model state
        changed, with an adaptive clip `below`."""
        return jax.eval_shape(self._first_upload, state)

    def download(self, state: Any) -> Any:
        """What is sent to a client, as ShapeDtypeStructs."""
        trainer = self.trainer
        return jax.eval_shape(
            lambda s: (
                trainer.shared(s.params),
                trainer.shared(s.model_state),
                trainer.algorithm.broadcast(s.server_state),
            ),
            state,
        )

    def specs(self, state: Any) -> Any:
        """A tree of PartitionSpec like a state."""

        def spec(path: Any, _: Any) -> PartitionSpec:
            return PartitionSpec(CLIENTS) if path[0].name in ("client_state", "in_flight") else PartitionSpec()

        return jax.tree_util.tree_map_with_path(spec, state)

    def program(self, begins: bool, ends: bool) -> Callable[..., Any]:
        """`(state, carry, data, chunk, clients, votes) -> (state, metrics)` where a round ends with this dispatch,
        else a carry; `carry` is None where one begins.

        clients: int32 [slots], whose each is. votes: float32 [D, V]. metrics: float32 [len(names) + V], the same on
        every device.
        """
        mine, all_ = PartitionSpec(CLIENTS), PartitionSpec()
        body = jax.shard_map(
            partial(self._on_device, begins=begins, ends=ends),
            mesh=self.mesh,
            in_specs=(all_, mine, mine, all_ if self.resident else mine, mine, mine),
            out_specs=(all_, mine, all_) if ends else mine,
            check_vma=False,
        )
        split = NamedSharding(self.mesh, mine)

        def run(
            state: FederatedState, carry: Carry | None, data: Data, chunk: Chunk, clients: jax.Array, votes: jax.Array
        ) -> Any:
            kept = state.client_state
            rows = jax.tree.map(lambda x: x.at[clients].get(mode="clip"), kept)
            rows = jax.lax.with_sharding_constraint(rows, split)
            out = body(dataclasses.replace(state, client_state=None), rows, carry, data, chunk, votes)
            if not ends:
                return out
            new, rows, metrics = out
            return dataclasses.replace(new, client_state=self.scattered(kept, rows, clients)), metrics

        return run

    def scattered(self, kept: ClientState, rows: ClientState, clients: jax.Array) -> ClientState:
        """Client state with the rows [slots, ...] of these clients in it."""
        places = jnp.where(clients < self.num_clients, clients, self.num_rows)
        kept = jax.tree.map(lambda x, row: x.at[places].set(row, mode="drop"), kept, rows)
        return jax.lax.with_sharding_constraint(kept, NamedSharding(self.mesh, PartitionSpec(CLIENTS)))

    def _on_device(
        self,
        state: FederatedState,
        rows: ClientState,
        carry: Carry | None,
        data: Data,
        chunk: Chunk,
        votes: jax.Array,
        *,
        begins: bool,
        ends: bool,
    ) -> Any:
        trainer, given = self.trainer, self._global(state)
        chunk = Chunk(*(x[0] for x in chunk))
        carry = self._empty(state, given, rows) if carry is None else jax.tree.map(lambda x: x[0], carry)

        def segment(i: Any, carry: Carry) -> Carry:
            now = Segment(*chunk.segments_DxSxF[i])
            own = jax.tree.map(lambda x: x[now.slot], rows)
            start = trainer.start(given, own, now)
            if begins and ends:  # every client is here as a whole
                local = trainer.begin(given, own)
            else:
                local = jax.lax.cond(now.first, lambda: trainer.begin(given, own), lambda: carry.local)
            local = trainer.run(local, given, start, now, self._fetch(data, chunk, now.client))

            def end() -> Carry:
                return self._end(carry, local, start, own, now, state, given)

            if begins and ends:
                return end()._replace(local=carry.local)  # as it was: nothing that a loop would have to copy
            return jax.lax.cond(now.last, end, lambda: carry._replace(local=local))

        carry = jax.lax.fori_loop(0, chunk.num_segments_D, segment, carry)
        if not ends:
            return jax.tree.map(lambda x: x[None], carry)
        new, metrics = self.finish(state, carry, given.rate)
        return new, carry.client_state, jnp.concatenate([metrics, jax.lax.psum(votes[0], CLIENTS)])

    def _global(self, state: FederatedState) -> Global:
        key = key_for(self.seed, "dropout", state.step)
        rate = jnp.asarray(self.schedule(state.step), jnp.result_type(float))
        broadcast = self.trainer.algorithm.broadcast(state.server_state)
        return Global(self._sent_down(state)[0], state.model_state, broadcast, rate, key)

    def _sent_down(self, state: FederatedState) -> tuple[Any, Any]:
        """(the parameters as the cohort gets them, the server's new residual)."""
        if self.downlink is None:
            return state.params, state.residual
        key = jax.random.fold_in(key_for(self.seed, "codec", state.step), self.num_clients)  # no client's
        sent, residual = self.downlink.send(self.trainer.shared(state.params), state.residual, key)
        return jax.lax.optimization_barrier((personal.join(sent, self.trainer.own(state.params)), residual))

    def _fetch(self, data: Data, chunk: Chunk, client: jax.Array) -> Callable[[Any], Batch]:
        B = chunk.positions_DxTxB.shape[-1]

        def fetch(i: Any) -> Batch:
            if self.resident:
                positions = chunk.positions_DxTxB[i]
                batch = {name: x.at[positions].get(mode="promise_in_bounds") for name, x in data.items()}
            else:
                batch = {name: x[0, i] for name, x in data.items()}
            batch["weight"] = (jnp.arange(B) < chunk.counts_DxT[i]).astype(jnp.float32)
            return batch if self.on_batch is None else self.on_batch(batch, client)

        return fetch

    def _empty(self, state: FederatedState, given: Global, rows: ClientState) -> Carry:
        one = jax.tree.map(lambda x: x[0], rows)
        local = self.trainer.begin(given, one)
        uploads = jax.eval_shape(self._summed, state, given, one)
        slots = self.num_slots // self.mesh.size
        lanes = self.num_lanes // self.mesh.size
        lead = slots if self.aggregate else lanes
        return Carry(
            local=local,
            uploads=jax.tree.map(lambda x: jnp.zeros((lead, *x.shape), x.dtype), uploads),
            weights=jnp.zeros(slots, local.sums.dtype),
            sums=jnp.zeros((lanes, 2 + len(COUNTS) + len(local.sums)), local.sums.dtype),
            client_state=rows,
        )

    def _first_upload(self, state: FederatedState) -> Any:
        given = self._global(state)
        one = jax.tree.map(lambda x: x[0], state.client_state)
        return self._upload_of_nobody(state, given, one)

    def _upload_of_nobody(self, state: FederatedState, given: Global, own: ClientState) -> Any:
        """For its shape."""
        nobody = Segment(*[jnp.zeros((), jnp.int32)] * len(Segment._fields))
        local = self.trainer.begin(given, own)
        return self._upload(local, self.trainer.start(given, own, nobody), own, nobody, state, given)[0]

    def _summed(self, state: FederatedState, given: Global, own: ClientState) -> Any:
        """What is added up of an upload, for its shape."""
        upload = self._upload_of_nobody(state, given, own)
        if self.secure is not None:
            return self.secure.encode(upload, jnp.int32(1), jax.random.key(0))
        return jax.tree.map(lambda x: x.astype(_wide(x)), upload)

    def _upload(
        self, local: Local, start: Start, own: ClientState, now: Segment, state: FederatedState, given: Global
    ) -> tuple[Any, ClientState, jax.Array]:
        """(what the server makes of what the client sends, what the client keeps, whether its message was finite).

        In this order: lies, the part that is sent, clip and noise, codec.
        """
        message, kept = self.trainer.end(local, start, now, given.rate)
        key = jax.random.fold_in(key_for(self.seed, "codec", state.step), now.client)
        for i, change in enumerate(self.on_message):
            message = change(message, jax.random.fold_in(key, i), now.client)
        upload = {"model_state": self._statistics(local, given)}
        finite = _is_finite((message, upload))  # now, for a clip or a codec may hide it
        if self.transmit is not None:
            message = self.transmit.only(message, optax.tree.zeros_like(message), state.step)
            algorithm = self.transmit.only(kept.algorithm, own.algorithm, state.step)
            kept = dataclasses.replace(kept, algorithm=algorithm)
        if isinstance(self.privacy, Central):
            message, below = self.privacy.client(message, state.privacy)
            upload |= {"below": below} if self.privacy.adaptive else {}
        elif self.privacy is not None:
            noise_key = jax.random.fold_in(key_for(self.seed, "privacy", state.step), now.client)
            message = self.privacy.client(message, noise_key)
        if self.parcels is not None:
            codec_key = jax.random.fold_in(key, len(self.on_message))
            message, memory = self.parcels.send(message, own.memory, state.step, codec_key)
            kept = dataclasses.replace(kept, memory=memory)
            if isinstance(self.privacy, Central):  # what a codec makes of a clipped message may be longer
                message = clip(message, state.privacy).update
        return {"message": message, **upload}, kept, finite

    def _statistics(self, local: Local, given: Global) -> Any:
        """How the shared model state changed."""
        shared = self.trainer.shared
        return jax.tree.map(lambda new, old: new - old, shared(local.model_state), shared(given.model_state))

    def _end(
        self, carry: Carry, local: Local, start: Start, own: ClientState, now: Segment, state: Any, given: Global
    ) -> Carry:
        """A client has ended: its upload is added, what it keeps goes into its row."""
        upload, kept, finite = self._upload(local, start, own, now, state, given)
        carry, finite = self.add(carry, upload, finite, local.sums, now, state)
        if self.skip_nonfinite:
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), kept, own)
        rows = jax.tree.map(lambda rows, x: rows.at[now.slot].set(x), carry.client_state, kept)
        return carry._replace(local=local, client_state=rows)

    def add(
        self, carry: Carry, upload: Any, finite: jax.Array, losses: jax.Array, now: Segment, state: FederatedState
    ) -> tuple[Carry, jax.Array]:
        """At the server: the carry with a client's upload in its lane's sums, or in its slot; whether all is finite.

        Args:
          upload: as it came. finite: whether the client's message was. losses: sums over its local steps.
        """
        finite = finite & _is_finite(upload) & jnp.isfinite(losses[0])
        if self.on_receipt is not None:
            upload = {**upload, "message": self.on_receipt(upload["message"], state.last_mean)}
        squared = _squared_norm(upload["message"])
        weight = jnp.asarray(now.draws * (now.num_samples if self.by_samples else 1), carry.sums.dtype)
        if self.skip_nonfinite:
            weight = jnp.where(finite, weight, 0)
            losses, squared = jnp.where(finite, losses, 0), jnp.where(finite, squared, 0)
            upload = jax.tree.map(lambda x: jnp.where(finite, x, 0), upload)
        lane = now.slot // self.slots_per_lane
        if self.aggregate:
            uploads = jax.tree.map(lambda rows, x: rows.at[now.slot].set(x), carry.uploads, upload)
        elif self.secure is not None:
            rounding = jax.random.fold_in(key_for(self.seed, "quantise", state.step), now.client)
            whole = self.secure.encode(upload, weight.astype(jnp.int32), rounding)
            uploads = jax.tree.map(lambda sums, x: sums.at[lane].add(x), carry.uploads, whole)
        else:
            uploads = jax.tree.map(lambda sums, x: sums.at[lane].add(weight * x), carry.uploads, upload)
        numbers = jnp.stack([weight, weight * squared, jnp.where(weight > 0, 1, 0), jnp.where(finite, 0, 1)])
        sums = carry.sums.at[lane].add(jnp.concatenate([numbers.astype(carry.sums.dtype), losses]))
        weights = carry.weights.at[now.slot].set(weight)
        return carry._replace(uploads=uploads, weights=weights, sums=sums), finite

    def finish(self, state: FederatedState, carry: Carry, rate: jax.Array) -> tuple[FederatedState, jax.Array]:
        """Inside a manual region over `clients`: the next state, which lacks client_state, and what was measured."""
        total = None
        if self.aggregate:
            sums, mean = sum_of_lanes(carry.sums), self.aggregate(carry.uploads, carry.weights)
        else:
            total, sums = self._totals(carry)
            # Barriers: XLA would fuse this with what comes after, and differently for another number of devices.
            inverse = jax.lax.optimization_barrier(1 / jnp.maximum(sums[0], jnp.finfo(sums.dtype).tiny))
            mean = jax.tree.map(lambda x: x * inverse, total)
        mean = jax.lax.optimization_barrier(mean)
        weight, squared, clients, nonfinite, loss_sum, loss_weight, *metrics = sums
        changes = weight > 0  # a round of nobody changes nothing
        if self.secure is not None:
            changes = clients >= self.secure.min_clients
        if isinstance(self.privacy, Central):
            new = self._privately(self.privacy, state, mean, total, changes)
        else:
            new = self.server.step(state, mean, clients, weight, changes)
        if self.transmit is not None:
            names = ("params", "server_state", "outer_opt_state")
            parts = {n: self.transmit.only(getattr(new, n), getattr(state, n), state.step) for n in names}
            new = dataclasses.replace(new, **parts)
        new = dataclasses.replace(new, residual=self._sent_down(state)[1])
        length = _squared_norm(mean["message"])
        drift = jnp.sqrt(jnp.maximum(squared / weight - length, 0) / length)
        if self.aggregate:  # what they differ from is not their mean
            drift = jnp.full((), jnp.nan)
        values = [loss_sum / loss_weight, *(x / loss_weight for x in metrics), rate, drift, clients, nonfinite]
        return new, jnp.stack([jnp.asarray(x, jnp.float32) for x in values])

    def _totals(self, carry: Carry) -> tuple[Any, jax.Array]:
        """(the sum of the uploads times their weights, the other sums)."""
        if self.secure is None:
            total, sums = sum_of_lanes((carry.uploads, carry.sums))
            return total, sums
        return self.secure.decode(self.secure.total(carry.uploads)), sum_of_lanes(carry.sums)

    def _privately(
        self, privacy: Central, state: FederatedState, mean: Any, total: Any, changes: jax.Array
    ) -> FederatedState:
        """The state after a sum with noise. The noise is there whoever came, and nothing else depends on it: how many
        they were is private too."""
        total = jax.tree.map(lambda x: jnp.where(changes, x, 0), total)
        given = Contribution(total["message"], total.get("below", jnp.zeros(())))
        message, next_clip = privacy.server(given, state.privacy, key_for(self.seed, "privacy", state.step))
        message, next_clip = jax.lax.optimization_barrier((message, next_clip))
        expected = jnp.float32(privacy.expected_cohort)
        new = self.server.step(state, {**mean, "message": message}, expected, expected)
        return dataclasses.replace(new, privacy=next_clip)


def _wide(x: Any) -> Any:
    """What it is summed in: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_finite(tree: Any) -> jax.Array:
    return jnp.isfinite(_squared_norm(tree))


def _squared_norm(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(_wide(x)), tree), squared=True)
