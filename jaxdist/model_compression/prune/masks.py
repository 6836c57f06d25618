"""Which weights are live after an update of the masks, for all pruned leaves of a model."""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.leaves import Leaf, is_leaf, leaves_of
from jaxdist.model_compression.prune import select
from jaxdist.model_compression.prune.methods import Weights
from jaxdist.model_compression.prune.pruning import Pruning
from jaxdist.model_compression.prune.sparsity import kept, layers_of
from jaxdist.randomness import key_for
from jaxdist.state_specs import owners

_LAYER = re.compile(r"^blocks/(\d+)/")  # a chain's blocks that are not stacked


class Masks:
    """The pruned leaves of a model, and what their masks become. Lists have one array for each of them.

    Args:
      params: arrays or ShapeDtypeStructs. leaves: tree of Leaf like them; None: by their names.

    Raises:
      ValueError: nothing is pruned, a layer would be emptied, a pattern does not divide a dimension.
    """

    def __init__(self, pruning: Pruning, params: Any, leaves: Any):
        leaves = leaves_of(params) if leaves is None else leaves
        self.pruning, self._leaves = pruning, leaves
        flat, tree = jax.tree.flatten(leaves, is_leaf=is_leaf)
        self._tree: Any = tree
        self._numbers = [i for i, leaf in enumerate(flat) if pruning.prunes(leaf)]
        self.leaves: list[Leaf] = [flat[i] for i in self._numbers]
        if not self.leaves:
            raise ValueError(f"prune: no parameter is pruned; there are {', '.join(leaf.name for leaf in flat)}")
        if pruning.pattern is not None:
            for leaf in self.leaves:
                _check_pattern(leaf, *pruning.pattern)
        else:
            layers = [layer for of_leaf in layers_of(self.leaves) for layer in of_leaf]
            self._sizes = [layer.size for layer in layers]
            # uint32 [updates, layers], or [updates, 1] where all layers are chosen from together.
            counts = [kept(layers, sparsity, pruning.distribution) for sparsity in pruning.sparsities]
            self._kept = np.asarray(counts, np.uint32)
            self._learning = kept(layers, pruning.learning_sparsity, pruning.distribution)

    def only(self, tree: Any) -> list[jax.Array]:
        """Those of a tree like the parameters."""
        flat = self._tree.flatten_up_to(tree)
        return [flat[i] for i in self._numbers]

    def like_parameters(self, arrays: Sequence[Any]) -> Any:
        """A tree like the parameters, with an empty node for each that is not pruned."""
        flat: list[Any] = [optax.MaskedNode()] * self._tree.num_leaves
        for i, x in zip(self._numbers, arrays, strict=True):
            flat[i] = x
        return jax.tree.unflatten(self._tree, flat)

    def replaced(self, tree: Any, arrays: Sequence[Any]) -> Any:
        """`tree`, like the parameters, with these in place of those that are pruned."""
        flat = self._tree.flatten_up_to(tree)
        for i, x in zip(self._numbers, arrays, strict=True):
            flat[i] = x
        return jax.tree.unflatten(self._tree, flat)

    def forgotten(self, state: Any, masks: Sequence[jax.Array]) -> Any:
        """An optimizer's state, what it holds of weights that are not live set to 0."""
        owner = owners(self._leaves)
        mask_of = {leaf.name: mask for leaf, mask in zip(self.leaves, masks, strict=True)}

        def one(path: Any, x: Any) -> Any:
            leaf = owner(path)
            if leaf is None or leaf.name not in mask_of or leaf.shape != x.shape:
                return x
            return jnp.where(mask_of[leaf.name], x, jnp.zeros((), x.dtype))

        return jax.tree_util.tree_map_with_path(one, state)

    def density(self, masks: Sequence[jax.Array]) -> jax.Array:
        """The part that is live, float32."""
        live = jnp.stack([jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32) for mask in masks]).sum()
        return live / float(sum(math.prod(leaf.shape) for leaf in self.leaves))

    def first(self) -> list[jax.Array]:
        """All live; of methods that grow weights, at random as many as there will be."""
        if self.pruning.method.grows is None:
            return [jnp.ones(leaf.shape, bool) for leaf in self.leaves]
        return self._largest(self._noise(0), self._kept[0])

    def next(
        self,
        step: jax.Array,
        before: Sequence[jax.Array],
        weights: Sequence[jax.Array],
        gradients: Sequence[jax.Array],
        sums: Sequence[Any],
    ) -> list[jax.Array]:
        """The masks of the optimizer's update with this number, where they are due."""
        pruning, method = self.pruning, self.pruning.method
        known = [Weights(*of) for of in zip(weights, gradients, sums, self._noise(step + 1), strict=True)]
        scores = [method.keeps(w) for w in known]
        if not method.hidden:
            scores = [jnp.where(live, x, -jnp.inf) for live, x in zip(before, scores, strict=True)]
        if pruning.pattern is not None:
            return [select.largest_of_groups(x, *pruning.pattern) for x in scores]
        updates = len(pruning.schedule.updates)
        index = jnp.clip((step - pruning.schedule.begin) // pruning.schedule.every, 0, updates - 1)
        if method.grows is None:
            return self._largest(scores, jnp.asarray(self._kept)[index])
        dropped = jnp.asarray(self._dropped)[index]
        staying = self._largest(scores, self._kept[0] - dropped)
        others = [jnp.where(live, -jnp.inf, method.grows(w)) for live, w in zip(before, known, strict=True)]
        return [a | b for a, b in zip(staying, self._largest(others, dropped), strict=True)]

    def learning(self, weights: Sequence[jax.Array]) -> list[jax.Array]:
        """Hidden weights that learn, where not all do."""
        return self._largest([jnp.abs(w) for w in weights], np.asarray(self._learning, np.uint32))

    @property
    def _dropped(self) -> np.ndarray:
        """Like `_kept`: of methods that grow weights, no more than can grow."""
        sizes = [sum(self._sizes)] if self.pruning.distribution == "global" else self._sizes
        wanted = np.round(np.outer(self.pruning.drop_fractions, self._kept[0]))
        return np.minimum(wanted, np.asarray(sizes) - self._kept[0]).astype(np.uint32)

    def _largest(self, scores: Sequence[jax.Array], counts: Any) -> list[jax.Array]:
        if self.pruning.distribution == "global":
            guarded = [_with_one_of_each_layer(x, leaf.stacked) for x, leaf in zip(scores, self.leaves, strict=True)]
            return select.largest(guarded, counts[0])
        found, first = [], 0
        for x, leaf in zip(scores, self.leaves, strict=True):
            lead = leaf.shape[: leaf.stacked]
            own = jnp.asarray(counts[first : first + math.prod(lead)]).reshape(lead)
            first += math.prod(lead)
            choose: Callable[..., Any] = lambda x, count: select.largest([x], count)[0]  # noqa: E731
            for _ in lead:
                choose = jax.vmap(choose)
            found.append(choose(x, own))
        return found

    def _noise(self, number: Any) -> list[jax.Array]:
        """Uniform, the same for stacked layers and for those that are not."""
        key = key_for(self.pruning.seed, "prune", number)

        def one(leaf: Leaf) -> jax.Array:
            layer = _LAYER.match(leaf.name)
            name = _LAYER.sub("blocks/", leaf.name)
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            lead, shape = leaf.shape[: leaf.stacked], leaf.shape[leaf.stacked :]
            if not lead:
                own = jax.random.fold_in(own, int(layer[1])) if layer else own
                return jax.random.uniform(own, shape)
            keys = jax.vmap(lambda i: jax.random.fold_in(own, i))(jnp.arange(math.prod(lead)))
            draw = jax.vmap(lambda k: jax.random.uniform(k, shape))
            return draw(keys).reshape(leaf.shape)

        return [one(leaf) for leaf in self.leaves]


def _with_one_of_each_layer(scores: jax.Array, stacked: int) -> jax.Array:
    """The largest of each layer comes before all else."""
    highest = scores.max(axis=tuple(range(stacked, scores.ndim)), keepdims=True)
    return jnp.where(scores == highest, jnp.inf, scores)


def _check_pattern(leaf: Leaf, n: int, m: int) -> None:
    shape = leaf.shape[leaf.stacked :]
    if len(shape) < 2 or shape[-2] % m:
        raise ValueError(
            f"prune: {leaf.name}: {m} of {n}:{m} does not divide its second last dimension, of {leaf.shape}; leave "
            "it out, or use another pattern"
        )
