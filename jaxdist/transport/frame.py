"""The bytes of a frame: prefix, header, arrays. Pure functions; whatever comes in, only FrameError comes out.

prefix   24 bytes, little endian: magic, version u16, flags u16, header bytes u32, payload bytes u64,
         CRC-32 of the prefix before it and of the header u32
header   JSON {"header": the caller's dict, "arrays": [[dtype, [dimensions]], ...]}
payload  the arrays' elements in C order, little endian, each array at a multiple of 64 bytes, zeros between
"""

import json
import math
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = b"JXDF"
VERSION = 1
ALIGNMENT = 64  # bytes; what XLA asks of a buffer that it is to use in place
THROUGH_MEMORY = 1  # flag: the payload comes through shared memory, not the socket
PREFIX = struct.Struct("<4sHHIQ")
_CRC = struct.Struct("<I")
PREFIX_BYTES = PREFIX.size + _CRC.size
MAX_DIMENSIONS = 32
_DTYPES = {
    np.dtype(d).name: np.dtype(d)
    for d in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
}
_ZEROS = bytes(ALIGNMENT)

assert sys.byteorder == "little", "frames hold arrays as they lie in the memory of little-endian machines"


class FrameError(ValueError):
    """What came is no frame, or one that this endpoint does not take. The connection is of no more use."""


@dataclass(frozen=True)
class Limits:
    """What may travel, in bytes. A receiver checks it before it takes memory, a sender before it sends in vain."""

    header: int = 1 << 24
    payload: int = 1 << 32


@dataclass(frozen=True)
class Prefix:
    flags: int
    header_bytes: int
    payload_bytes: int


@dataclass(frozen=True)
class Placed:
    """Where an array lies in a payload."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """A frame to be sent. `payload` looks into the arrays that were given: they must not change until it is sent."""

    header: bytes
    payload: tuple[memoryview, ...]
    payload_bytes: int

    def head(self, flags: int = 0) -> bytes:
        """Prefix and header."""
        prefix = PREFIX.pack(MAGIC, VERSION, flags, len(self.header), self.payload_bytes)
        return prefix + _CRC.pack(zlib.crc32(self.header, zlib.crc32(prefix))) + self.header


def encode(header: dict[str, Any], arrays: Sequence[Any] = (), limits: Limits | None = None) -> Encoded:
    """Raises TypeError or ValueError for a header that JSON cannot hold, TypeError for a dtype that does not travel,
    FrameError for what a receiver of these limits would refuse.

    Arrays that are not contiguous are copied; others are not (of a jax.Array on the CPU, neither).
    """
    limits = limits or Limits()
    specs, payload, end = [], [], 0
    for array in map(np.asarray, arrays):
        if _DTYPES.get(array.dtype.name) != array.dtype:
            raise TypeError(f"an array of dtype {array.dtype} does not travel; these do: {', '.join(_DTYPES)}")
        specs.append([array.dtype.name, list(array.shape)])
        start = _aligned(end)
        if start > end:
            payload.append(memoryview(_ZEROS)[: start - end])
        end = _placed(specs[-1], start, limits).stop
        if array.nbytes:
            payload.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    text = json.dumps({"header": header, "arrays": specs}, separators=(",", ":"))
    _check_sizes(len(text), end, limits)
    return Encoded(text.encode(), tuple(payload), end)


def parse_prefix(data: bytes | bytearray, limits: Limits) -> Prefix:
    magic, version, flags, header_bytes, payload_bytes = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FrameError(f"not a frame: it begins with {bytes(data[:4])!r}")
    if version != VERSION:
        raise FrameError(f"a frame of version {version}; this is version {VERSION}")
    if flags & ~THROUGH_MEMORY:
        raise FrameError(f"unknown flags {flags:#x}")
    _check_sizes(header_bytes, payload_bytes, limits)
    return Prefix(flags, header_bytes, payload_bytes)


def parse_header(
    prefix_data: bytes | bytearray, prefix: Prefix, header_data: bytes | bytearray, limits: Limits
) -> tuple[dict[str, Any], list[Placed]]:
    """The caller's dict, and where each array will lie in the payload."""
    (crc,) = _CRC.unpack_from(prefix_data, PREFIX.size)
    if crc != zlib.crc32(header_data, zlib.crc32(prefix_data[: PREFIX.size])):
        raise FrameError("the header's checksum is wrong")
    try:
        document = json.loads(header_data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header is not JSON: {error}") from None
    if not isinstance(document, dict) or document.keys() != {"header", "arrays"}:
        raise FrameError("the header is not of the form {header, arrays}")
    header, specs = document["header"], document["arrays"]
    if not isinstance(header, dict) or not isinstance(specs, list):
        raise FrameError("the header is not of the form {header: {}, arrays: []}")
    placed: list[Placed] = []
    end = 0
    for spec in specs:
        placed.append(_placed(spec, _aligned(end), limits))
        end = placed[-1].stop
        if end > prefix.payload_bytes:
            raise FrameError(f"arrays of {end} bytes or more in a payload of {prefix.payload_bytes}")
    if end != prefix.payload_bytes:
        raise FrameError(f"arrays of {end} bytes in a payload of {prefix.payload_bytes}")
    return header, placed


def views(placed: Sequence[Placed], payload: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays, in the memory of a received payload (uint8, aligned), which they keep alive."""
    arrays = []
    for place in placed:
        octets = payload[place.start : place.stop]
        if place.dtype == np.bool_ and octets.size and octets.max() > 1:
            raise FrameError("an array of booleans holds a byte that is neither 0 nor 1")
        arrays.append(octets.view(place.dtype).reshape(place.shape))
    return tuple(arrays)


def parse(data: bytes, limits: Limits) -> tuple[dict[str, Any], tuple[np.ndarray, ...], int]:
    """A whole frame, copied: the caller's dict, the arrays, and the frame's length in bytes."""
    if len(data) < PREFIX_BYTES:
        raise FrameError(f"{len(data)} bytes are no frame")
    prefix = parse_prefix(data, limits)
    body = PREFIX_BYTES + prefix.header_bytes
    end = body + prefix.payload_bytes
    if len(data) < end:
        raise FrameError(f"{len(data)} bytes of a frame of {end}")
    header, placed = parse_header(data[:PREFIX_BYTES], prefix, data[PREFIX_BYTES:body], limits)
    return header, views(placed, np.frombuffer(bytearray(data[body:end]), np.uint8)), end


def _aligned(end: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT


def _check_sizes(header_bytes: int, payload_bytes: int, limits: Limits) -> None:
    if header_bytes > limits.header:
        raise FrameError(f"a header of {header_bytes} bytes; at most {limits.header} are taken")
    if payload_bytes > limits.payload:
        raise FrameError(f"a payload of {payload_bytes} bytes; at most {limits.payload} are taken")


def _placed(spec: Any, start: int, limits: Limits) -> Placed:
    if not isinstance(spec, list) or len(spec) != 2 or not isinstance(spec[0], str) or not isinstance(spec[1], list):
        raise FrameError("an array is not given as [dtype, [dimensions]]")
    name, shape = spec
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise FrameError(f"an array of unknown dtype {name[:40]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= limits.payload for size in shape):
        raise FrameError("an array's dimensions are too many, too large or no counts")
    # Also for arrays without elements: NumPy would refuse a stride that overflows.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > max(limits.payload, dtype.itemsize):
        raise FrameError(f"an array of {shape} {name} is more than the {limits.payload} bytes that are taken")
    return Placed(dtype, tuple(shape), start, start + math.prod(shape) * dtype.itemsize)
