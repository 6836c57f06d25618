"""A silo's numbers: its client's local training, by the engine of the simulation with one lane and one client."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxdist.federated import personal
from jaxdist.federated.algorithm import State
from jaxdist.federated.engine import Engine
from jaxdist.federated.feed import Feed
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.privacy.noise import secret_key
from jaxdist.federated.programs import Programs
from jaxdist.federated.silos.disk import Disk, check_name
from jaxdist.federated.silos.messages import NEVER
from jaxdist.federated.silos.rules import Arrays, Trained, Work
from jaxdist.federated.silos.words import Words
from jaxdist.federated.state import ClientState, FederatedState
from jaxdist.transport.plain import check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneClient(Engine):
    """One lane, one row of client state, and a carry that holds the upload as it is. Its server state is what `sent`
    makes of the server's."""

    sent: Callable[[State], State] = lambda state: state

    @property
    def num_rows(self) -> int:
        return 1

    def initial_state(self, params: Any, model_state: Any) -> FederatedState:
        state = super().initial_state(params, model_state)
        return dataclasses.replace(
            state, server_state=self.sent(state.server_state), outer_opt_state=(), last_mean=()
        )


def of_one_client(engine: Engine) -> OneClient:
    """`engine`: of one lane, without privacy."""
    algorithm = engine.trainer.algorithm
    changed = {
        "trainer": dataclasses.replace(
            engine.trainer, algorithm=dataclasses.replace(algorithm, broadcast=lambda state: state)
        ),
        "aggregate": lambda uploads, weights: uploads,
        "keeps_mean": False,
        "skip_nonfinite": False,  # which is for the server to decide
    }
    return OneClient(**{**vars(engine), **changed}, sent=algorithm.broadcast)


@dataclass(frozen=True)
class Training:
    """Rounds of one client.

    Args:
      engine, programs, feed, votes: of this client alone.
      download: what clients are sent, a tree of ShapeDtypeStruct.
      beginning: the parameters and model state that the run starts from, asked for once.
      directory: of this silo.
      skips: an update that is not finite changes nothing at its client.
      privacy: of each message. Its noise is this client's own: whoever has the config cannot take it off again.
      words: with secure aggregation; `weight`: what the client then counts.
      moved: called when something was done.
    """

    engine: OneClient
    programs: Programs
    feed: Feed
    client: int
    votes: jax.Array
    download: Any
    beginning: Callable[[], tuple[Any, Any]]
    directory: Path
    skips: bool = False
    privacy: Local | None = None
    words: Words | None = None
    weight: int = 1
    moved: Callable[[], None] = lambda: None

    @cached_property
    def _data(self) -> dict[str, jax.Array] | None:
        return self.feed.everything() if self.feed.resident else None

    @cached_property
    def _beginning(self) -> tuple[Any, Any, ClientState]:
        """(params, model_state, the client's state), as they are before all rounds."""
        params, model_state = self.beginning()
        return params, model_state, self.engine.trainer.initial_state(params, model_state)

    def compile(self) -> None:
        """All that a round needs, so that the first takes no longer than others."""
        _ = self._data, self._beginning
        self.programs.get(True, False)
        measured, train = self.feed.plan.steps_of(self.feed.plan.sizes)
        if (measured + train)[self.client] > self.feed.capacity:
            self.programs.get(False, False)

    def check(self, run: str, arrays: Arrays) -> None:
        """Raises ValueError for what this client cannot have been sent."""
        check_name(run)
        check(arrays, self.specs)

    @property
    def specs(self) -> list[jax.ShapeDtypeStruct]:
        """Of the arrays that a client is sent."""
        return jax.tree.leaves(self.download)

    def disk(self, work: Work) -> Disk:
        return Disk(self.directory, work.run, self._beginning[2])

    def __call__(self, work: Work) -> Trained:
        disk = self.disk(work)
        if self.words is not None and not disk.give_out(work.round):
            return Trained(())
        disk.keep_only({*work.keep, work.after} - {NEVER})
        own = self._own(disk, work)
        state, carry = self._state(work, own), None
        for now in self.feed.dispatches(work.round, work.round + 1, self._data):
            program = self.programs.get(now.begins, False)
            carry = program(state, carry, now.data, now.chunk, now.clients, self.votes)
            jax.block_until_ready(carry.sums)
            self.moved()
        assert carry is not None
        upload, kept = jax.tree.map(lambda x: x[0, 0], (carry.uploads, carry.client_state))
        sums = np.asarray(carry.sums[0, 0])
        is_finite = sums[3] == 0
        disk.save(work.round, own if self.skips and not is_finite else kept)
        if self.privacy is not None:
            upload = {**upload, "message": self.privacy.client(upload["message"], secret_key())}
        if self.words is None:
            return Trained((*pack(upload), sums[4:]))
        if not is_finite:
            return Trained(())
        means = np.delete(sums[4:], 1) / sums[5]
        return Trained((self.words.encode(upload, means, self.weight, work.round, self.client),))

    def _own(self, disk: Disk, work: Work) -> ClientState:
        own = self._beginning[2] if work.after == NEVER else disk.load(work.after)
        if own is None:
            log.warning("what was kept of round %d is lost: this client begins anew", work.after)
        return self._beginning[2] if own is None else own

    def _state(self, work: Work, own: ClientState) -> FederatedState:
        """What the engine needs of the server's state, with this client's row alone."""
        trainer, (first_params, first_model_state, _) = self.engine.trainer, self._beginning
        params, model_state, broadcast = jax.tree.unflatten(jax.tree.structure(self.download), work.arrays)
        state = FederatedState(
            step=jnp.asarray(work.round, jnp.int32),
            params=personal.join(params, trainer.own(first_params)),
            model_state=personal.join(model_state, trainer.own(first_model_state)),
            server_state=broadcast,
            outer_opt_state=(),
            last_mean=(),
            client_state=jax.tree.map(lambda x: jnp.asarray(x)[None], own),
        )
        shardings = jax.tree.map(lambda spec: NamedSharding(self.engine.mesh, spec), self.engine.specs(state))
        return jax.device_put(state, shardings)


def pack(tree: Any) -> Arrays:
    """The arrays of a tree, as they travel."""
    return tuple(map(np.asarray, jax.tree.leaves(tree)))
