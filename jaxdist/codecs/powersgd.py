"""Low rank: two thin factors in place of a matrix.

Shape letters: L stacked layers, n rows, m columns, r the rank.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdist.codecs import wire
from jaxdist.codecs.bits import check_encodable, is_floating
from jaxdist.codecs.codec import Exchange, Keys


@dataclass(frozen=True)
class PowerSGD:
    """One step of subspace iteration on the mean gradient, begun where the last one ended (Vogels et al. 2019,
    arXiv 1905.13727, algorithm 1). The state is Q, [*stacked, m, r].

    An array of more than two dimensions is cut into rows and columns where there are fewest of both together; the
    first `stacked` dimensions count layers, each of which is a matrix of its own. Without a mesh the payload has P
    [*stacked, n, r], its columns orthonormal, and Q.
    """

    rank: int = 4
    stacked: int = 0
    block: ClassVar[None] = None
    exchange: ClassVar[Exchange] = "gather"  # of the factors, where nobody calls `reduce`
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"PowerSGD: rank is {self.rank}; it must be at least 1")
        if self.stacked < 0:
            raise ValueError(f"PowerSGD: stacked is {self.stacked}; it must be at least 0")

    def contraction(self, size: int) -> float:
        """0: what it sends is a projection of x, so the error is never larger than x, but for an x that the last
        step's Q knows nothing of it may be as large."""
        del size
        return 0.0

    def num_bytes(self, spec: jax.ShapeDtypeStruct) -> int:
        """Of the payload of an array like `spec`: (n + m) r numbers a layer."""
        num_layers, rows, columns = self._matrices(spec.shape)
        return num_layers * (rows + columns) * min(self.rank, rows, columns) * spec.dtype.itemsize

    def takes(self, spec: jax.ShapeDtypeStruct) -> bool:
        if not is_floating(spec) or spec.size == 0 or sum(n > 1 for n in spec.shape[self.stacked :]) < 2:
            return False
        _, rows, columns = self._matrices(spec.shape)
        return (rows + columns) * self.rank < rows * columns

    def init(self, spec: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        _, rows, columns = self._matrices(spec.shape)
        shape = (*spec.shape[: self.stacked], columns, min(self.rank, rows, columns))
        return jax.random.normal(key, shape, spec.dtype)

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        del keys
        check_encodable(self, x)
        matrix = self._matrix(x)
        p = orthonormal(matrix @ state)
        q = matrix.mT @ p
        return {"p": p, "q": q}, q

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        return (payload["p"] @ payload["q"].mT).reshape(spec.shape).astype(spec.dtype)

    def reduce(
        self, xs: list[jax.Array], states: list[Any], keys: list[Keys], axis: str
    ) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
        """Two all-reduces whatever the number of arrays: of all P, of all Q."""
        del keys
        for x in xs:
            check_encodable(self, x)
        matrices = [self._matrix(x) for x in xs]
        ps = [orthonormal(p) for p in _mean([m @ q for m, q in zip(matrices, states, strict=True)], axis)]
        own_qs = [m.mT @ p for m, p in zip(matrices, ps, strict=True)]
        qs = _mean(own_qs, axis)
        means, contributed = (
            [(p @ q.mT).reshape(x.shape) for p, q, x in zip(ps, of, xs, strict=True)] for of in (qs, own_qs)
        )
        return means, contributed, qs

    def _matrix(self, x: jax.Array) -> jax.Array:
        """[*stacked, n, m]"""
        _, rows, columns = self._matrices(x.shape)
        return x.reshape(*x.shape[: self.stacked], rows, columns)

    def _matrices(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(number of them, rows, columns)"""
        layers, own = shape[: self.stacked], shape[self.stacked :]
        cuts = [(math.prod(own[:cut]), math.prod(own[cut:])) for cut in range(len(own) + 1)]
        rows, columns = min(cuts, key=sum)
        return math.prod(layers), rows, columns


def orthonormal(p: jax.Array) -> jax.Array:
    """[..., n, r]: orthonormal columns whose span has those of p. Householder's are that for zeros too, and for
    columns that depend on each other, where Gram and Schmidt's would be noise or not a number."""
    return jnp.linalg.qr(p)[0]


def _mean(arrays: list[jax.Array], axis: str) -> list[jax.Array]:
    """Over the axis, as one all-reduce for each dtype there is."""
    means: dict[int, jax.Array] = {}
    for dtype in dict.fromkeys(x.dtype for x in arrays):
        same = {i: x for i, x in enumerate(arrays) if x.dtype == dtype}
        total = jax.lax.psum(wire.fuse([x.reshape(-1) for x in same.values()]), axis) / jax.lax.axis_size(axis)
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in same.values()]
        means |= dict(zip(same, wire.split(total, specs), strict=True))
    return [means[i] for i in range(len(arrays))]
