"""The numbers of one shard: parameters and optimizer state on one device, and what is kept for those who read them.

Arrays of jax never change, so whatever is handed out or kept is a reference: a snapshot costs nothing until the next
update makes new arrays. Updated in place are the optimizer's state, which nobody but a capture ever sees, and tables
that travel by row, which an evaluator sees too; after either the next update is made on a copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.leaves import is_leaf, leaves_of
from jaxdist.parameter_server.contracts import Arrays, Contribution
from jaxdist.parameter_server.payloads import ShardFormat
from jaxdist.parameter_server.pulls import Pulls
from jaxdist.parameter_server.rows import Tables
from jaxdist.state_specs import owners


class Captured(NamedTuple):
    """All that an update changes, in references."""

    params: Any
    model_state: Any
    opt_state: Any
    guard_state: Any
    bases: dict[int, Any]  # parameters by version, for guards that need those of a contribution's base


class JaxStore:
    """See jaxdist.parameter_server.contracts.Store for the contract.

    An update is: decode each contribution, let the guard correct it, add it up times its share of the weight, in the
    order given, by one compiled program; then the optimizer's update of the sum by another. Both are the same
    whatever the number of contributions, so that one process which adds up the same gradients in the same order gets
    the same bits, shard for shard (another cut is another program, in which XLA may round elsewhere). A single
    contribution without codec and guard is the gradient itself.

    Of tables that travel by row only the rows that are touched are read and written (jaxdist.parameter_server.rows);
    no update takes as long as the table is.

    Args:
      params: the shard's part, a nested dict of arrays. model_state: the whole of it on shard 0, else {}.
      optimizer: of the shard's leaves; its own count of updates is the version, for schedules of the learning rate.
      guard: corrects each contribution (jaxdist.parameter_server.guards); None: none.
      needs_base: whether the guard reads the parameters that a gradient was computed on; then those of every version
        that may still be the base of a contribution are kept.
      device: one of this process; None: the first.
    """

    def __init__(
        self,
        params: Any,
        model_state: Any,
        optimizer: optax.GradientTransformation,
        form: ShardFormat,
        *,
        guard: optax.GradientTransformationExtraArgs | None = None,
        needs_base: bool = False,
        device: jax.Device | None = None,
    ):
        self.form, self.version = form, 0
        self._optimizer, self._guard = optax.with_extra_args_support(optimizer), guard
        self._needs_base = needs_base
        self._device = device or jax.local_devices()[0]
        params, model_state = self._own((params, model_state))
        self._now = Captured(
            params,
            model_state,
            # A copy: what a transform takes over from the parameters must not be updated in place.
            self._own(self._optimizer.init(params)),
            guard.init(params) if guard else (),
            {0: params} if needs_base else {},
        )
        self._seen = False  # whether somebody has a reference to what is updated in place
        self._kept: tuple[int, Arrays] | None = None
        self._pulls = Pulls(form.down)
        self._tree, sharding = jax.tree.structure(params), jax.sharding.SingleDeviceSharding(self._device)
        self._tables, self._state_tables = _tables(form, params, self._now.opt_state)
        assert not (self._has_tables and needs_base), "a table that is updated in place has no earlier versions"
        self._zeros = jax.jit(self._empty, out_shardings=sharding)
        self._accumulate = jax.jit(self._accumulated, donate_argnums=0)
        self._update = jax.jit(self._updated, donate_argnums=(0, 2))
        self._rows = jax.jit(Tables(tuple(n for n in self._tables.number if n is not None)).rows)
        self._add_states = jax.jit(_states_added, donate_argnums=0)

    def apply(self, contributions: Sequence[Contribution], version: int, oldest_base: int) -> None:
        params, model_state, opt_state, guard_state, bases = self._now
        weights = np.asarray([one.weight for one in contributions], np.float64)
        assert weights.sum() > 0, "a push of no samples was to be applied"
        shares = (weights / weights.sum()).astype(np.float32)
        # Compiled programs read aligned NumPy arrays where they are, and are called sooner with them than with jax's.
        parts = [list(one.arrays) for one in contributions]
        own, end = len(self.form.up.expected), len(self.form.push) - len(self.form.ids)
        touched = [part[end:] for part in parts]  # beside gradients, [:own], and model state, [own:end]
        rows: Sequence[np.ndarray] = touched[0]
        if len(parts) == 1 and self._guard is None and not self.form.up.compresses:
            gradient = jax.tree.unflatten(self._tree, parts[0][:own])
        else:
            rows = [ids.union(found) for ids, *found in zip(self.form.ids, *touched, strict=True)]
            gradient = self._zeros(rows)
            for one, part, theirs, share in zip(contributions, parts, touched, shares, strict=True):
                seen = (params, self._base(one.base_version), one.staleness, self.version) if self._guard else None
                places = [np.searchsorted(*pair).astype(np.int32) for pair in zip(rows, theirs, strict=True)]
                gradient, guard_state = self._accumulate(gradient, guard_state, part[:own], share, seen, places)
        tables, others = self._tables.split(jax.tree.leaves(params))
        if self._seen:
            tables, opt_state = self._own((tables, opt_state))
            self._seen = False
        # Of what a guard made of a push nobody knows the norm: it is measured here, where all parameters are.
        norm = contributions[0].norm if len(contributions) == 1 and self._guard is None else None
        params, opt_state = self._update(tables, others, opt_state, gradient, norm, rows)
        if self.form.model_state:
            model_state = self._mean_state(model_state, [part[own:end] for part in parts], shares)
        if self._needs_base:
            bases = {v: base for v, base in bases.items() if v >= oldest_base} | {version: params}
        self._now, self.version = Captured(params, model_state, opt_state, guard_state, bases), version

    def pull(self, worker: str, serial: int, full: bool, wanted: Arrays = ()) -> tuple[bool, Arrays]:
        params, model_state = (jax.tree.leaves(tree) for tree in self._now[:2])
        if wanted:
            tables, others = self._tables.split(params)
            params = self._tables.joined(self._rows(tables, list(wanted)), others)
        return self._pulls.answer(worker, serial, full, params, model_state)

    def forget(self, worker: str) -> None:
        self._pulls.forget(worker)

    def keep(self, version: int) -> None:
        self._kept = version, _numpy(self._now[:2])
        self._seen |= self._has_tables

    def kept(self) -> tuple[int, Arrays] | None:
        return self._kept

    def capture(self) -> Captured:
        self._seen = True
        return self._now

    def arrays_of(self, captured: Captured) -> Arrays:
        return [np.asarray(list(captured.bases), np.int64), *_numpy(captured)]

    def load_arrays(self, arrays: Arrays, version: int) -> None:
        bases = {int(v): self._now.params for v in arrays[0]}
        like = jax.tree.structure(self._now._replace(bases=bases))
        self._become(Captured(*jax.tree.unflatten(like, list(arrays[1:]))), version)

    def tree(self, captured: Captured | None = None) -> dict[str, Any]:
        """What a checkpoint holds of this shard, of now or of a capture: names are those of a sync run's state, and
        `guard_state`. The counts of an optimizer stand in the trees of all shards."""
        whole = (captured or self.capture())._asdict()
        return {name: part for name, part in whole.items() if name != "bases"}

    def abstract_tree(self) -> dict[str, Any]:
        """What to restore a checkpoint into: ShapeDtypeStructs with shardings, like `tree`."""
        whole = self._now._asdict()
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
        return {name: jax.tree.map(struct, part) for name, part in whole.items() if name != "bases"}

    def load_tree(self, tree: dict[str, Any], version: int) -> None:
        """Become what a checkpoint holds, as `tree` gives it. Parameters of versions before it are not there: a
        contribution that was computed on one is taken for one on these."""
        self._become(Captured(**tree, bases={version: tree["params"]} if self._needs_base else {}), version)

    def _become(self, captured: Captured, version: int) -> None:
        self._now, self.version, self._seen = self._own(captured), version, False
        self._pulls = Pulls(self.form.down)

    def _own(self, tree: Any) -> Any:
        """Copies on the store's device."""
        return jax.device_put(tree, self._device, may_alias=False)

    def _base(self, version: int) -> Any:
        """The parameters of that version, or what comes nearest: after a return to a checkpoint a contribution's base
        may be older than all that are there, or of a version that is no more."""
        bases = self._now.bases
        return bases[max((v for v in bases if v <= version), default=min(bases))] if bases else None

    @property
    def _has_tables(self) -> bool:
        return bool(self.form.ids)

    def _empty(self, rows: Sequence[Any]) -> Any:
        """A gradient of nothing, with as many rows of tables."""
        shapes = [
            p.shape if n is None else (len(rows[n]), *p.shape[1:])
            for p, n in zip(self.form.params, self._tables.number, strict=True)
        ]
        zeros = [jnp.zeros(shape, p.dtype) for shape, p in zip(shapes, self.form.params, strict=True)]
        return jax.tree.unflatten(self._tree, zeros)

    def _accumulated(
        self, total: Any, guard_state: Any, part: Any, share: Any, guarded: Any, places: Sequence[Any]
    ) -> Any:
        gradient = jax.tree.unflatten(self._tree, self.form.up.decode(part))
        if self._guard is not None:
            params, base, staleness, version = guarded
            gradient, guard_state = self._guard.update(
                gradient, guard_state, params, staleness=staleness, base_params=base, version=version
            )
        weighted = [share.astype(g.dtype) * g for g in jax.tree.leaves(gradient)]
        total = self._tables.added(jax.tree.leaves(total), weighted, places)
        return jax.tree.unflatten(self._tree, total), guard_state

    def _updated(
        self, tables: Any, others: Any, opt_state: Any, gradient: Any, norm: Any, rows: Sequence[Any]
    ) -> Any:
        flat, (state, tree) = self._tables.joined(tables, others), jax.tree.flatten(opt_state)
        params = jax.tree.unflatten(self._tree, self._tables.rows(flat, rows))
        touched = jax.tree.unflatten(tree, self._state_tables.rows(state, rows))
        updates, new = self._optimizer.update(gradient, touched, params, grad_norm=norm)
        changed = jax.tree.leaves(optax.apply_updates(params, updates))
        state = self._state_tables.with_rows(state, jax.tree.leaves(new), rows)
        params = jax.tree.unflatten(self._tree, self._tables.with_rows(flat, changed, rows))
        return params, jax.tree.unflatten(tree, state)

    def _mean_state(self, state: Any, parts: Sequence[list[np.ndarray]], shares: np.ndarray) -> Any:
        """The weighted mean of what workers have made of it; the last one's where it is no float."""
        total = [jnp.zeros_like(x) for x in jax.tree.leaves(state)]
        for part, share in zip(parts, shares, strict=True):
            total = self._add_states(total, part, share)
        return jax.tree.unflatten(jax.tree.structure(state), total)


def _tables(form: ShardFormat, params: Any, opt_state: Any) -> tuple[Tables, Tables]:
    """Which parameters are tables, and which arrays of the optimizer's state have a row for each of theirs."""
    own = [None if ids is None else form.ids.index(ids) for ids in form.rows or (None,) * len(form.params)]
    leaves = jax.tree.leaves(leaves_of(params), is_leaf=is_leaf)
    number_of = {leaf.name: number for leaf, number in zip(leaves, own, strict=True)}
    owner = owners(leaves)

    def number(path: Any, x: Any) -> int | None:
        leaf = owner(path)
        return None if leaf is None or leaf.shape != x.shape else number_of[leaf.name]

    of_state = [number(path, x) for path, x in jax.tree_util.tree_leaves_with_path(opt_state)]
    return Tables(tuple(own)), Tables(tuple(of_state))


def _states_added(total: list[jax.Array], part: list[jax.Array], share: Any) -> list[jax.Array]:
    return [
        t + share.astype(t.dtype) * x if jnp.issubdtype(t.dtype, jnp.floating) else x
        for t, x in zip(total, part, strict=True)
    ]


def _numpy(tree: Any) -> Arrays:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]
