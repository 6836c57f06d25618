"""The compiled programs of an engine: at most four, whatever the rounds."""

from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.federated.engine import Engine
from jaxdist.federated.feed import Dispatch
from jaxdist.federated.reduce import CLIENTS


class Programs:
    """Compiled when they are first needed.

    Args: state, data, chunk, clients, votes: ShapeDtypeStructs with shardings of what each call is given.
    """

    def __init__(self, engine: Engine, state: Any, data: Any, chunk: Any, clients: Any, votes: Any):
        self._engine, self._state, self._given = engine, state, (data, chunk, clients, votes)
        self.clients, self.votes = clients, votes
        self._compiled: dict[tuple[bool, bool], jax.stages.Compiled] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def lower(self, begins: bool = True, ends: bool = True) -> jax.stages.Lowered:
        mesh = self._engine.mesh
        mine, all_ = NamedSharding(mesh, PartitionSpec(CLIENTS)), NamedSharding(mesh, PartitionSpec())
        out = (jax.tree.map(lambda x: x.sharding, self._state), all_) if ends else mine
        donated = (0, 1) if ends else 1
        program = jax.jit(self._engine.program(begins, ends), donate_argnums=donated, out_shardings=out)
        return program.lower(self._state, None if begins else self.carry, *self._given)

    @cached_property
    def carry(self) -> Any:
        """As ShapeDtypeStructs with shardings."""
        mine = NamedSharding(self._engine.mesh, PartitionSpec(CLIENTS))
        shapes = jax.eval_shape(self._engine.program(True, False), self._state, None, *self._given)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mine), shapes)

    def compile_for(self, begins: bool, last: bool) -> None:
        """What a dispatch needs, the first or the last of a round."""
        self.get(begins, last)

    def run(self, now: Dispatch, state: Any, carry: Any, votes: jax.Array) -> Any:
        """(state, metrics) where a round ends, else a carry."""
        return self.get(now.begins, now.last)(state, carry, now.data, now.chunk, now.clients, votes)

    def get(self, begins: bool, ends: bool) -> jax.stages.Compiled:
        if (begins, ends) not in self._compiled:
            self._compiled[begins, ends] = self.lower(begins, ends).compile()
        return self._compiled[begins, ends]
