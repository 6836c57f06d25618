"""What a worker remembers of what compression left out: its own, in units of the mean gradient.

A memory is a dict of lists, one entry a parameter, None where nothing is kept. Its mean over workers is what it will
still add to the mean gradient; so when their number changes, each of the new ones begins with that mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

Arrays = list[jax.Array]
Memory = dict[str, list[Any]]
Exchange = Callable[[Arrays], tuple[Arrays, list[Any]]]
"""What each worker encodes -> (means over workers, what the others saw of this worker's; None: all of it)."""
SquaredNorm = Callable[[Arrays], jax.Array]
"""|x|^2 of all parameters' arrays together, whole ones even where a device has shards."""


class Feedback(Protocol):
    """`compressed[i]` says whether parameter i is ever compressed; memories in `shared` are alike on all workers."""

    shared: ClassVar[tuple[str, ...]] = ()

    @property
    def changes_all(self) -> bool:
        """Whether parameters that are never compressed are changed, too, before they are sent."""
        return False

    def init(self, specs: list[jax.ShapeDtypeStruct], compressed: list[bool]) -> Memory: ...

    def mean(
        self, gradients: Arrays, memory: Memory, exchange: Exchange, squared_norm: SquaredNorm, num_workers: int
    ) -> tuple[Arrays, Memory]:
        """(mean over workers as all see it, this worker's new memory)."""
        ...

    def left_out(self, gradients: Arrays | None, memory: Memory) -> list[Any] | None:
        """What of this worker's gradients the others have not seen before this step, None for those that are always
        sent whole. None for all: that takes this step's gradients, and they were not given."""
        ...


@dataclass(frozen=True)
class NoFeedback(Feedback):
    """What is left out is lost: for unbiased codecs."""

    def init(self, specs: list[jax.ShapeDtypeStruct], compressed: list[bool]) -> Memory:
        del specs, compressed
        return {}

    def mean(
        self, gradients: Arrays, memory: Memory, exchange: Exchange, squared_norm: SquaredNorm, num_workers: int
    ) -> tuple[Arrays, Memory]:
        del squared_norm, num_workers
        return exchange(gradients)[0], memory

    def left_out(self, gradients: Arrays | None, memory: Memory) -> list[Any] | None:
        del gradients, memory
        return []


@dataclass(frozen=True)
class ErrorFeedback(Feedback):
    """What was not sent is added to the next gradient (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847,
    algorithm 2, but that the residual is of gradients and the learning rate comes after).

    `momentum` above 0 is Deep Gradient Compression's correction (Lin et al. 2018, arXiv 1712.01887, algorithm 1 and
    section 3): each worker sends its momentum and forgets it where it was sent. `clip_norm` clips each worker's
    gradient before, to sqrt(N) times that norm: the mean of N unlike gradients has a norm sqrt(N) times smaller.
    """

    momentum: float = 0.0
    clip_norm: float | None = None

    @property
    def changes_all(self) -> bool:
        return bool(self.momentum) or self.clip_norm is not None

    def init(self, specs: list[jax.ShapeDtypeStruct], compressed: list[bool]) -> Memory:
        memory = {"residual": _zeros(specs, compressed)}
        return memory | ({"momentum": _zeros(specs, [True] * len(specs))} if self.momentum else {})

    def mean(
        self, gradients: Arrays, memory: Memory, exchange: Exchange, squared_norm: SquaredNorm, num_workers: int
    ) -> tuple[Arrays, Memory]:
        if self.clip_norm is not None:
            largest = self.clip_norm * num_workers**0.5
            factor = jnp.minimum(1.0, largest / jnp.sqrt(squared_norm(gradients)))
            gradients = [g * factor.astype(g.dtype) for g in gradients]
        if self.momentum:
            gradients = [self.momentum * m + g for m, g in zip(memory["momentum"], gradients, strict=True)]
        owed = [g if r is None else g + r for g, r in zip(gradients, memory["residual"], strict=True)]
        means, seen = exchange(owed)
        new = {"residual": [_rest(*of) for of in zip(memory["residual"], owed, seen, strict=True)]}
        if self.momentum:
            forgotten = [m if s is None else jnp.where(s == 0, m, 0) for m, s in zip(gradients, seen, strict=True)]
            new["momentum"] = forgotten
        return means, new

    def left_out(self, gradients: Arrays | None, memory: Memory) -> list[Any] | None:
        del gradients
        return memory["residual"]


@dataclass(frozen=True)
class EF21(Feedback):
    """Each worker sends by how much its gradient differs from what the others believe it to be; all keep the mean of
    these beliefs (Richtarik, Sokolov & Fatkhullin 2021, arXiv 2106.05203, algorithm 2)."""

    shared: ClassVar[tuple[str, ...]] = ("mean_estimate",)

    def init(self, specs: list[jax.ShapeDtypeStruct], compressed: list[bool]) -> Memory:
        return {"estimate": _zeros(specs, compressed), "mean_estimate": _zeros(specs, compressed)}

    def mean(
        self, gradients: Arrays, memory: Memory, exchange: Exchange, squared_norm: SquaredNorm, num_workers: int
    ) -> tuple[Arrays, Memory]:
        del squared_norm, num_workers
        own, believed = memory["estimate"], memory["mean_estimate"]
        changes = [g if h is None else g - h for g, h in zip(gradients, own, strict=True)]
        mean_changes, seen = exchange(changes)
        means = [m if h is None else h + m for m, h in zip(mean_changes, believed, strict=True)]
        return means, {
            "estimate": [
                None if h is None else h + (c if s is None else s) for h, c, s in zip(own, changes, seen, strict=True)
            ],
            "mean_estimate": [None if h is None else m for h, m in zip(believed, means, strict=True)],
        }

    def left_out(self, gradients: Arrays | None, memory: Memory) -> list[Any] | None:
        if gradients is None:
            return None
        return [None if h is None else g - h for g, h in zip(gradients, memory["estimate"], strict=True)]


def _rest(residual: Any, owed: jax.Array, seen: Any) -> Any:
    if residual is None:
        return None
    return jnp.zeros_like(owed) if seen is None else owed - seen


def _zeros(specs: list[jax.ShapeDtypeStruct], kept: list[bool]) -> list[Any]:
    return [jnp.zeros(s.shape, s.dtype) if keep else None for s, keep in zip(specs, kept, strict=True)]
