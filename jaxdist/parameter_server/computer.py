"""The numbers of one worker: parameters as the shards sent them, and what it pushes after computing on them."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.codecs.compression import all_finite
from jaxdist.data.source import Rows
from jaxdist.data.stream import Stream
from jaxdist.parameter_server.contracts import Arrays, Result, Work
from jaxdist.parameter_server.formats import Formats
from jaxdist.parameter_server.gradients import Gradients
from jaxdist.parameter_server.messages import Ranges
from jaxdist.parameter_server.partition import Partition
from jaxdist.parameter_server.payloads import received
from jaxdist.parameter_server.rows import distinct, renumbered
from jaxdist.task import Task


class IslandComputer:
    """See jaxdist.parameter_server.contracts.Computer for the contract.

    Without `inner` a push is the mean gradient over the work's samples. With it the worker makes `local_steps` steps
    of its own, each over an equal part of the samples, and pushes by how much they have lessened the parameters: a
    gradient to the server's optimizer (DiLoCo, Douillard et al. 2023, arXiv 2311.08105, algorithm 1).

    What goes on from push to push (what codecs left out, the inner optimizer's state) is kept by `Work.seq`, the
    number of the push: work begins with what was kept of the push `Work.after`, the last one that was not discarded.
    So what servers have applied and what a memory of error feedback holds add up to the gradients of the pushes that
    were applied, exactly but for rounding. Where work began before a push was discarded (buffered), what that push
    had carried of earlier gradients is lost with it.

    Args:
      like: (params, model_state) of the whole model, arrays or ShapeDtypeStructs.
      inner: the optimizer of local steps. Its schedule of the learning rate is read at version * steps_per_version +
        step of the work, so that it does not depend on how often this worker had a turn.
      microbatch, precision: see Gradients. devices: of this process; None: the first.
    """

    def __init__(
        self,
        task: Task,
        stream: Stream,
        like: tuple[Any, Any],
        partition: Partition,
        formats: Formats,
        *,
        seed: int,
        microbatch: int,
        precision: str = "fp32",
        inner: optax.GradientTransformation | None = None,
        steps_per_version: int = 1,
        devices: Sequence[jax.Device] | None = None,
    ):
        own = list(devices or jax.local_devices()[:1])
        like = formats.pulled(like[0]), like[1]
        self._ids = distinct(ids for form in formats.shards for ids in form.ids)
        self._stream = stream
        self._gradients = Gradients(task, stream, like, own, seed=seed, microbatch=microbatch, precision=precision)
        self._everywhere = self._gradients.everywhere
        self._partition, self._formats, self._seed = partition, formats, seed
        self._inner, self._steps_per_version = inner, steps_per_version
        self._like = like
        self._params_tree, self._state_tree = (jax.tree.structure(tree) for tree in like)
        self._parts: list[list[jax.Array]] = [[] for _ in formats.shards]
        self._model_state: list[jax.Array] = []
        self._looked: tuple[Any, Rows, dict[str, np.ndarray]] | None = None  # (ranges, their samples, rows touched)
        self._states: dict[int, Any] = {}  # right after pushes; before the first: made with the first parameters, or
        # restored
        self._initial = jax.jit(self._initial_state, out_shardings=self._everywhere)
        self._advance = [jax.jit(form.down.advanced) if form.down else None for form in formats.shards]
        self._encode = jax.jit(self._encoded, out_shardings=self._everywhere)
        self._step = jax.jit(self._stepped, out_shardings=self._everywhere)
        self._subtract = jax.jit(lambda a, b: jax.tree.map(jnp.subtract, a, b))

    def wants(self, ranges: Ranges) -> list[Arrays]:
        """Raises UserError for an id in the data that is no row."""
        _, touched = self._look(ranges)
        return [[touched[ids.field] for ids in form.ids] for form in self._formats.shards]

    def take(self, shard: int, full: bool, arrays: Arrays) -> None:
        form = self._formats.shards[shard]
        number = len(arrays) - len(form.model_state)
        new = received(arrays, self._everywhere)
        if form.model_state:
            self._model_state = new[number:]
        advance = self._advance[shard]
        if full or advance is None:
            self._parts[shard] = new[:number]
        else:
            assert self._parts[shard], "a difference to nothing"
            self._parts[shard] = advance(self._parts[shard], new[:number])

    def compute(self, work: Work) -> Result:
        assert all(self._parts), "nothing was pulled yet"
        params = jax.tree.unflatten(self._params_tree, list(chain(*self._parts)))
        model_state = jax.tree.unflatten(self._state_tree, self._model_state)
        before = self._state_before(work, params)
        positions = _positions(work.ranges)
        rows, touched = self._look(work.ranges)
        draw = jax.device_put(np.asarray([positions[0] % 2**32], np.uint32), self._everywhere)
        new = dict(before)
        if self._inner is None:
            assert work.local_steps == 1
            totals = self._gradients.sums(params, model_state, positions, rows)
            gradient, model_state = self._gradients.means(totals, model_state)
            each = [totals["sums"]]
        else:
            assert not touched, "local steps on rows"
            gradient, model_state, new["inner"], each = self._locally(
                work, params, model_state, before["inner"], positions
            )
        parts, norm, finite, new["memory"], new["codecs"] = self._encode(
            gradient, model_state, new["memory"], new["codecs"], draw
        )
        found = jax.device_get((each, norm, finite))
        sums = {name: float(sum(float(one[name]) for one in found[0])) for name in found[0][0]}
        finite = bool(found[2]) and all(map(math.isfinite, sums.values()))
        self._states[work.seq] = new if finite else before  # a NaN in a memory would stay for ever
        return Result(
            parts=tuple(
                [*map(np.asarray, part), *(touched[ids.field] for ids in form.ids)]
                for part, form in zip(parts, self._formats.shards, strict=True)
            ),
            weight=sums["weight"],
            sums=sums,
            norm=float(found[1]),
            finite=finite,
            computed=sum(map(self._gradients.computed, np.array_split(positions, work.local_steps))),
        )

    def state(self, seq: int) -> Any:
        """What was kept right after push `seq`; None if that is too long ago, or nothing was computed yet."""
        return self._states.get(seq)

    @property
    def has_state(self) -> bool:
        """Whether anything goes on from push to push."""
        return bool(jax.tree.leaves(self.abstract_state()))

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave, in a new process."""
        wanted = jax.tree.structure(self.abstract_state())
        self._states = {0: jax.device_put(jax.tree.unflatten(wanted, jax.tree.leaves(state)), self._everywhere)}

    def abstract_state(self) -> Any:
        """ShapeDtypeStructs like `state`: `memory` of error feedback, by parameter; states of `codecs`, by shard;
        `inner`, the local optimizer's."""
        return jax.eval_shape(self._initial_state, self._like[0])

    def _look(self, ranges: Ranges) -> tuple[Rows | None, dict[str, np.ndarray]]:
        """(these samples, for tables of the rows that they touch; the ids of these rows, by field). Nothing is read
        where no table travels by row."""
        if not self._ids:
            return None, {}
        if self._looked is None or self._looked[0] != ranges:
            rows = self._stream.rows(_positions(ranges))
            touched = {ids.field: ids.touched(rows) for ids in self._ids}
            self._looked = ranges, renumbered(rows, touched), touched
        return self._looked[1:]

    def _initial_state(self, params: Any) -> dict[str, Any]:
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(params)]
        return {
            "memory": self._formats.feedback.init(specs, list(self._formats.remembers)),
            "codecs": [form.up.init(jax.random.key(self._seed)) for form in self._formats.shards],
            "inner": () if self._inner is None else self._inner.init(params),
        }

    def _state_before(self, work: Work, params: Any) -> Any:
        """What the work goes on from, or what comes nearest: after the loss of a server that may be gone."""
        states = self._states or {0: self._initial(params)}
        before = states[max((seq for seq in states if seq <= work.after), default=min(states))]
        self._states = {seq: state for seq, state in states.items() if work.oldest <= seq <= work.after}
        return self._states.setdefault(work.after, before)

    def _locally(
        self, work: Work, params: Any, model_state: Any, opt_state: Any, positions: np.ndarray
    ) -> tuple[Any, Any, Any, list[Any]]:
        """(how far the parameters went down, model state, inner state, sums of each step)."""
        assert 0 < work.local_steps <= len(positions)
        local, each = params, []
        for i, own in enumerate(np.array_split(positions, work.local_steps)):
            totals = self._gradients.sums(local, model_state, own)
            gradient, model_state = self._gradients.means(totals, model_state)
            number = np.int32(work.version * self._steps_per_version + i)
            local, opt_state = self._step(local, opt_state, gradient, number)
            each.append(totals["sums"])
        return self._subtract(params, local), model_state, opt_state, each

    def _stepped(self, params: Any, opt_state: Any, gradient: Any, number: Any) -> Any:
        assert self._inner is not None
        updates, opt_state = self._inner.update(gradient, _at_step(opt_state, number), params)
        return optax.apply_updates(params, updates), opt_state

    def _encoded(self, gradient: Any, model_state: Any, memory: Any, codecs: Any, draw: jax.Array) -> Any:
        """(arrays to each shard, norm, whether all is finite, new memory, new states of codecs)."""
        parts, states = [], []

        def exchange(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
            seen: list[Any] = []
            of_shards = self._partition.of_shards(arrays)
            for form, own, state in zip(self._formats.shards, of_shards, codecs, strict=True):
                sent, decoded, new = form.up.encode(own, state, draw)
                parts.append(sent)
                states.append(new)
                seen += decoded
            return [x if s is None else s for x, s in zip(arrays, seen, strict=True)], seen

        flat = jax.tree.leaves(gradient)
        feedback = self._formats.feedback
        decoded, memory = feedback.mean(flat, memory, exchange, _squared_norm, num_workers=1)
        state = jax.tree.leaves(model_state)
        parts[0] += state
        floats = [x for x in state if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = all_finite([*flat, *decoded, *floats])  # what was finite may be beyond a codec's range
        return parts, optax.tree.norm(gradient), finite, memory, states


def _positions(ranges: Ranges) -> np.ndarray:
    return np.concatenate([np.arange(start, start + count, dtype=np.int64) for start, count in ranges])


def _at_step(opt_state: Any, number: Any) -> Any:
    """An optimizer's state whose schedule of the learning rate is read at `number` next."""

    def schedules(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def at(node: Any) -> Any:
        return node._replace(count=jnp.asarray(number, jnp.int32)) if schedules(node) else node

    return jax.tree.map(at, opt_state, is_leaf=schedules)


def _squared_norm(arrays: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.square(x)) for x in arrays), start=jnp.zeros((), arrays[0].dtype))
