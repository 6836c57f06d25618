"""How the model does at every client: all clients' own validation samples in one pass, and again after each has
fine-tuned it.

A dispatch has so many tiles of R rows on each device, whatever the number of devices, and sums over a client's tiles
are made on the host, in their order: the numbers are the same on 1, 2, 4, ... devices.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.partition.partition import Partition
from jaxdist.data.placement import Placement
from jaxdist.data.source import Source
from jaxdist.federated import personal
from jaxdist.federated.algorithm import fedavg
from jaxdist.federated.client import Global, Trainer
from jaxdist.federated.client_table import FINE_TUNED, HELD_OUT, TRAINED, ClientTable, record_names
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Segment, shuffled
from jaxdist.federated.state import ClientState, FederatedState
from jaxdist.federated.tiles import rows_of_tile, tiles_of
from jaxdist.randomness import key_for
from jaxdist.task import Batch

ROWS = 256  # of a device, in a dispatch
TILE = 32  # rows at most
TUNED_TOGETHER = 8  # clients of a device
EVERYWHERE, MINE, ROWS_MINE = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)

Model = tuple[Any, Any]
"""(params, model_state)."""
Placed = Callable[[np.ndarray, PartitionSpec], jax.Array]
"""An array that every process has whole, on the mesh."""


@dataclass(frozen=True)
class FineTuning:
    """`steps` of so many samples, at the learning rate `rate(round)`."""

    steps: int
    batch_size: int
    rate: Callable[[int], Any]
    seed: int


@dataclass(frozen=True)
class ClientEvaluation:
    """Of the clients that have validation samples."""

    trainer: Trainer
    mesh: Mesh
    placed: Placed
    source: Source
    partition: Partition  # whose `validation` is evaluated
    held_out: np.ndarray  # int64: clients that do not train
    fine_tuning: FineTuning | None = None

    @property
    def names(self) -> list[str]:
        """Of the record."""
        metrics = ["loss", *self.trainer.metric_names]
        if self.fine_tuning is not None:
            metrics += [FINE_TUNED + name for name in metrics]
        return record_names(metrics, (TRAINED, HELD_OUT) if len(self.held_out) else (TRAINED,))

    def __call__(self, state: FederatedState, stop: Callable[[], bool] = lambda: False) -> ClientTable | None:
        """None as soon as a process says `stop`, asked before each dispatch; on every process at the same one."""
        trainer, clients = self.trainer, self._clients
        shared = trainer.shared(state.params), trainer.shared(state.model_state)
        own = state.client_state.params, state.client_state.model_state
        sums = self._sums(shared, own, clients, clients, stop)
        if sums is None:
            return None
        columns = self._means(sums, "")
        if self.fine_tuning is not None:
            tuned = self._sums_after_fine_tuning(self.fine_tuning, state, stop)
            if tuned is None:
                return None
            columns |= self._means(tuned, FINE_TUNED)
        names = tuple(self.partition.names[client] for client in clients)
        samples, held_out = self._validation.sizes[clients], np.isin(clients, self.held_out)
        return ClientTable(clients, names, samples, held_out, columns)

    @property
    def _validation(self) -> Partition:
        assert self.partition.validation is not None
        return self.partition.validation

    @cached_property
    def _clients(self) -> np.ndarray:
        return np.flatnonzero(self._validation.sizes)

    @cached_property
    def _rows_of_tile(self) -> int:
        return rows_of_tile(self._validation.sizes[self._clients], TILE)

    @property
    def _tiles_of_device(self) -> int:
        return ROWS // self._rows_of_tile

    def _means(self, sums: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
        means = sums / sums[:, 1:2]
        names = ("loss", None, *self.trainer.metric_names)
        return {prefix + name: means[:, i] for i, name in enumerate(names) if name is not None}

    def _sums(
        self, shared: Model, own: Model, clients: np.ndarray, rows: np.ndarray, stop: Callable[[], bool]
    ) -> np.ndarray | None:
        """Of loss, weight and metrics of each client: float64 [clients, 2 + metrics].

        `own`: what of a model is not in `shared`, leaves [any, ...], of which client i takes row rows[i].
        """
        tiles = tiles_of(self._validation.offsets, clients, self._rows_of_tile)
        sums = np.zeros((len(clients), 2 + len(self.trainer.metric_names)))
        together = self._tiles_of_device * self.mesh.size
        for start in range(0, len(tiles.owners), together):
            here = np.minimum(np.arange(start, start + together), len(tiles.owners) - 1)
            weights = tiles.weights_NxR[here]
            weights[len(tiles.owners) - start :] = 0  # the last tile again
            batch = self._batch(self._validation.ids[tiles.positions_NxR[here]], weights)
            of_tiles = self.placed(rows[tiles.owners[here]].astype(np.int32), MINE)
            against = self.placed(np.full(self.mesh.size, stop(), np.float32), MINE)
            measured, votes = self._measure(shared, own, of_tiles, batch, against)
            if np.asarray(votes).any():
                return None
            np.add.at(sums, tiles.owners[here], np.asarray(measured, np.float64))
        return sums

    def _batch(self, ids: np.ndarray, weights: np.ndarray) -> Batch:
        """Samples of any shape as [1, samples, ...], split over the devices."""
        placement = Placement(NamedSharding(self.mesh, ROWS_MINE), ids.size, 1)
        mine = ids.ravel()[placement.local_rows]
        sample_id = mine.astype(np.int32 if len(self.source) <= 2**31 else np.int64)
        rows = {**self.source.get(mine), "sample_id": sample_id, "weight": weights.ravel()[placement.local_rows]}
        return placement.put(rows)

    @cached_property
    def _measure(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(shared, own, rows [tiles], batch [1, tiles x R, ...], votes [devices]) -> (sums [tiles, 2 + metrics],
        votes), on every device."""

        def one_tile(shared: Model, own: Model, tile: Batch) -> jax.Array:
            params, model_state = personal.join(shared, own)
            return self.trainer.measure(params, model_state, tile)

        def on_device(shared: Model, own: Model, batch: Batch, votes: jax.Array) -> tuple[jax.Array, jax.Array]:
            tiles = {name: x[0].reshape(-1, self._rows_of_tile, *x.shape[2:]) for name, x in batch.items()}
            return jax.vmap(one_tile, (None, 0, 0))(shared, own, tiles), votes

        return self._program(on_device, in_specs=(EVERYWHERE, MINE, ROWS_MINE, MINE), out=EVERYWHERE)

    def _program(self, on_device: Callable[..., Any], in_specs: Any, out: PartitionSpec) -> Any:
        """Jitted. The second argument has leaves [any, ...], and the third says which rows of it the devices take."""
        body = jax.shard_map(on_device, mesh=self.mesh, in_specs=in_specs, out_specs=MINE, check_vma=False)
        split = NamedSharding(self.mesh, MINE)

        def run(given: Any, own: Model, rows: jax.Array, *more: Any) -> Any:
            taken = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), own)
            return body(given, jax.lax.with_sharding_constraint(taken, split), *more)

        return jax.jit(run, out_shardings=NamedSharding(self.mesh, out))

    def _sums_after_fine_tuning(
        self, fine_tuning: FineTuning, state: FederatedState, stop: Callable[[], bool]
    ) -> np.ndarray | None:
        clients, together = self._clients, TUNED_TOGETHER * self.mesh.size
        nothing = jax.tree.map(lambda _: None, (state.params, state.model_state))
        found = []
        for start in range(0, len(clients), together):
            group = clients[start : start + together]
            filled = np.concatenate([group, np.repeat(group[-1:], together - len(group))])
            models = self._fine_tuned(fine_tuning, state, filled)
            sums = self._sums(nothing, models, group, np.arange(len(group)), stop)
            if sums is None:
                return None
            found.append(sums)
        return np.concatenate(found)

    def _fine_tuned(self, fine_tuning: FineTuning, state: FederatedState, clients: np.ndarray) -> Model:
        """What each client makes of the model, leaves [clients, ...] over the devices."""
        step, needed = int(state.step), fine_tuning.steps * fine_tuning.batch_size
        sizes, starts = self.partition.sizes[clients], self.partition.offsets[clients]
        order, begin = shuffled(fine_tuning.seed, step, clients, sizes, -(-needed // sizes))
        ids = self.partition.ids[starts[:, None] + order[begin[:, None] + np.arange(needed)]]
        batch = self._batch(ids, np.ones(ids.shape, np.float32))
        rate = np.asarray(fine_tuning.rate(max(step - 1, 0)), jnp.result_type(float))
        given = (state.params, state.model_state), self.placed(rate, EVERYWHERE), state.step
        own = state.client_state.params, state.client_state.model_state
        numbers = self.placed(clients.astype(np.int32), MINE)
        return self._train(given, own, numbers, numbers, batch)

    @cached_property
    def _train(self) -> Callable[..., Model]:
        """((model, rate, step), own, clients, clients, batch [1, clients x steps x B, ...]) -> models."""
        fine_tuning = self.fine_tuning
        assert fine_tuning is not None
        trainer, steps = dataclasses.replace(self.trainer, algorithm=fedavg()), fine_tuning.steps
        nothing = Segment(*[0] * len(Segment._fields))

        def one_client(given: Any, own: Model, client: jax.Array, batches: Batch) -> Model:
            (params, model_state), rate, step = given
            sent = Global(params, model_state, (), rate, key_for(fine_tuning.seed, "fine_tune", step))
            state, segment = ClientState((), *own), nothing._replace(client=client, stop=steps, num_steps=steps)
            start, local = trainer.start(sent, state, segment), trainer.begin(sent, state)
            local = trainer.run(local, sent, start, segment, lambda i: {name: x[i] for name, x in batches.items()})
            return local.params, local.model_state

        def on_device(given: Any, own: Model, clients: jax.Array, batch: Batch) -> Model:
            lead = len(clients), steps, fine_tuning.batch_size
            batches = {name: x[0].reshape(*lead, *x.shape[2:]) for name, x in batch.items()}
            return jax.lax.map(lambda x: one_client(given, *x), (own, clients, batches))

        return self._program(on_device, in_specs=(EVERYWHERE, MINE, MINE, ROWS_MINE), out=MINE)
