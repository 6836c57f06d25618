"""Modules as plain parameters, and equal blocks of them, for tasks that are chains."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxdist.chain import Chain
from jaxdist.config.model import Remat
from jaxdist.leaves import kind_by_name, leaves_of
from jaxdist.randomness import sample_keys
from jaxdist.task import Batch, Loss


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


class ChainTask(ABC):
    """A task of a stem (embeddings, the last norm, the head) and L equal blocks, called `block(x, keys, number)`.

    Parameters: the stem's and `blocks`, each by its number or, with `scan_layers`, stacked [L, ...]. The same key
    initialises both forms to the same values. A task made of it gives `embed` and `head` (see jaxdist.chain.Chain).
    """

    def __init__(self, stem: Parts, block: Parts, layers: int, *, scan_layers: bool, remat: Remat, draws: bool):
        self._stem, self._block, self._layers = stem, block, layers
        self.scan_layers, self._draws = scan_layers, draws
        self.chain = Chain(layers, self.embed, self.block, self.head, remat)

    @abstractmethod
    def embed(self, rest: Any, batch: Batch, key: jax.Array | None) -> Any:
        """Activations that enter the first block."""

    @abstractmethod
    def head(self, rest: Any, activations: Any, batch: Batch) -> Any:
        """(loss_sum, weight, metric sums) of what leaves the last one."""

    def block(self, own: Any, state: Any, x: Any, number: Any, batch: Batch, key: jax.Array | None) -> Any:
        return self._block.module(own)(x, self._keys(batch, key), number), state

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        keys_L = jax.random.split(jax.random.fold_in(key, 1), self._layers)
        if self.scan_layers:
            blocks = jax.vmap(self._block.init)(keys_L)
        else:
            blocks = {str(i): self._block.init(keys_L[i]) for i in range(self._layers)}
        return {**self._stem.init(jax.random.fold_in(key, 0)), "blocks": blocks}, {}

    def leaves(self, params: Any) -> Any:
        return leaves_of(params, lambda name: "norm" if "norm/" in name else kind_by_name(name))  # a norm's bias too

    def loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Loss:
        return self.chain.loss(params, model_state, batch, key)

    def _keys(self, batch: Batch, key: jax.Array | None) -> jax.Array | None:
        return sample_keys(key, batch["sample_id"]) if self._draws and key is not None else None
