"""Modules as plain parameters, and equal blocks of them, for tasks that are chains."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxdist.chain import is_stacked
from jaxdist.leaves import Leaf, is_leaf, kind_by_name, leaves_of


class Parts:
    """A Flax NNX module split once: its parameters apart, as a plain dict, and what makes them a module again."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)), nnx.Param))

    def module(self, params: Any) -> Any:
        """The live module; other entries of `params` are left out."""
        return nnx.merge(self._graph, {name: part for name, part in params.items() if name != "blocks"})


def init_blocks(block: Parts, layers: int, key: jax.Array, *, stacked: bool) -> Any:
    """Parameters of `layers` blocks, each from a key of its own: stacked, or {"0": ..., "1": ...}."""
    keys_L = jax.random.split(key, layers)
    if stacked:
        return jax.vmap(block.init)(keys_L)
    return {str(i): block.init(keys_L[i]) for i in range(layers)}


def chain_leaves(params: Any) -> Any:
    """Leaf metadata of a chain's parameters."""
    tree = leaves_of(params, _kind)
    if is_stacked(params["blocks"]):
        tree["blocks"] = jax.tree.map(_stacked, tree["blocks"], is_leaf=is_leaf)
    return tree


def _stacked(leaf: Leaf) -> Leaf:
    return dataclasses.replace(leaf, stacked=1)


def _kind(name: str) -> Any:
    return "norm" if "norm/" in name else kind_by_name(name)  # a norm's bias too
