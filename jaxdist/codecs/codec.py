"""What a gradient codec is: one array in, the arrays that travel out, and back.

One codec serves collectives between devices, a push to a server and an upload of a client: it knows neither of
axes nor of sockets, but for the few whose sum is cheaper than their parts (`Reduces`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax

Payload = Any
"""A pytree of arrays of static shapes and of dtypes that travel as they are: no bfloat16, float8 or int4, which
XLA's CPU back end would widen, but their bit patterns (`wire.as_bits`)."""

Exchange = Literal["two_phase", "gather", "sum"]


class Keys(NamedTuple):
    """Where a codec draws at random from."""

    private: jax.Array  # another one on every worker: noise that averages out
    shared: jax.Array  # the same on every worker: choices that need not be sent


class Codec(Protocol):
    """`decode(encode(x))` is what the others see of x. Frozen and hashable: a part of the program.

    An array is seen flat, in row-major order, cut into blocks of `block` elements, the last one filled up with zeros.
    Blocks are encoded independently of each other, so that arrays may be put end to end, each filled up to a whole
    number of blocks, and encoded as one: the leading dimension of each array of the payload then counts blocks, or
    parts of equal size of them. A codec with `block` None sees each array as one and has its shape.

    `exchange` says which collective makes the mean of payloads:
      two_phase  each worker gets its part of all arrays, adds in float32, encodes the mean again and sends it to all;
                 a codec with a method `combine(sum, sum of magnitudes, key)` says what stands in place of the mean
      gather     every worker gets every payload; a codec with a method `add(total, payload, key_shared)` adds one to
                 `total` without decoding it as a whole
      sum        payloads add up: decode(sum of payloads) = sum of decoded payloads
    """

    @property
    def block(self) -> int | None: ...

    @property
    def exchange(self) -> Exchange: ...

    @property
    def unbiased(self) -> bool:
        """Whether E decode(encode(x)) = x."""
        ...

    def contraction(self, size: int) -> float:
        """delta such that E |decode(encode(x)) - x|^2 <= (1 - delta) |x|^2 for every x of `size` elements; 0 or
        below where none is guaranteed, and error feedback may then diverge."""
        ...

    def takes(self, spec: jax.ShapeDtypeStruct) -> bool:
        """Whether it makes an array like this smaller; one that it does not is sent as it is."""
        ...

    def init(self, spec: jax.ShapeDtypeStruct, key: jax.Array) -> Any:
        """The state for one array like `spec`, the same on every worker for the same key; () if it keeps none."""
        ...

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Payload, Any]:
        """(payload, new state) of a float32 array of any shape (float64 where enabled)."""
        ...

    def decode(self, payload: Payload, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        """An array like `spec`; the same bits wherever it is decoded."""
        ...


@runtime_checkable
class Reduces(Protocol):
    """A codec with a mean of its own over a mesh axis, inside a manual region."""

    def reduce(
        self, xs: list[jax.Array], states: list[Any], keys: list[Keys], axis: str
    ) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
        """(means, what this worker contributed to each, new states) of several arrays at once, so that all of them
        share its collectives. The mean over workers of what each contributed is the mean."""
        ...


@dataclass(frozen=True)
class Uncompressed:
    """The array itself, added up by an all-reduce: what has no codec."""

    block: ClassVar[int | None] = None
    exchange: ClassVar[Exchange] = "sum"
    unbiased: ClassVar[bool] = True

    def contraction(self, size: int) -> float:
        del size
        return 1.0

    def takes(self, spec: jax.ShapeDtypeStruct) -> bool:
        del spec
        return True

    def init(self, spec: jax.ShapeDtypeStruct, key: jax.Array) -> Any:
        del spec, key
        return ()

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Payload, Any]:
        del keys
        return x, state

    def decode(self, payload: Payload, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del spec, key_shared
        return payload


def held_down(codec: Codec, size: int) -> bool:
    """Whether error feedback is known to keep the error of arrays of `size` elements bounded: Karimireddy et al. 2019
    (arXiv 1901.09847) prove it for contractions. What reduces by itself (PowerSGD) is none for certain, but a
    projection, whose next step starts from what is left."""
    return codec.contraction(codec.block or size) > 0 or isinstance(codec, Reduces)


def payload_bytes(codec: Codec, spec: jax.ShapeDtypeStruct) -> int:
    """Bytes of the payload of one array like `spec`, from its static shapes."""

    def encode() -> Payload:
        key = jax.random.key(0)
        x = jax.numpy.zeros(spec.shape, spec.dtype)
        return codec.encode(x, codec.init(spec, key), Keys(key, key))[0]

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(encode)))
