"""Frames of the transport, and the buffers that they are received into."""

import gc
import mmap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdist.transport.buffers import Pool
from jaxdist.transport.frame import Limits, encode, parse

MEBIBYTE = 1 << 20


# Frames

DTYPES = [bool, np.int8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64, np.complex64]
ARRAYS = st.lists(
    st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0))), max_size=5
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(header=st.dictionaries(st.text(), JSON, max_size=4), arrays=ARRAYS)
@settings(max_examples=100, deadline=None)
def test_a_frame_brings_header_and_arrays_bit_for_bit(header, arrays):
    frame = encode(header, arrays)
    data = frame.head() + b"".join(frame.payload)
    found, parsed, length = parse(data, Limits())
    assert found == header
    assert length == len(data)
    assert [(a.dtype, a.shape, a.tobytes()) for a in parsed] == [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def test_narrow_floats_and_arrays_that_are_not_contiguous_travel_too():
    arrays = [np.arange(6, dtype=dtype) for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)]
    arrays += [np.arange(24.0).reshape(4, 6).T, np.arange(24.0)[::-3]]
    frame = encode({}, arrays)
    _, parsed, _ = parse(frame.head() + b"".join(frame.payload), Limits())
    for array, found in zip(arrays, parsed, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["text"]), np.arange(3, dtype=">i4")])
def test_dtypes_that_mean_something_only_here_do_not_travel(array):
    with pytest.raises(TypeError, match="does not travel"):
        encode({}, [array])


# Buffers


def as_float32(lent: np.ndarray) -> np.ndarray:
    return lent.view(np.float32)


def test_a_buffer_comes_back_when_the_last_view_of_it_is_gone():
    pool = Pool()
    lent = pool.take(MEBIBYTE)
    address = lent.ctypes.data
    view = as_float32(lent)[8:].reshape(2, -1)[1]
    del lent
    gc.collect()
    assert pool.idle_bytes == 0
    assert pool.take(MEBIBYTE).ctypes.data != address
    del view
    assert pool.take(MEBIBYTE).ctypes.data in (address, pool.take(MEBIBYTE).ctypes.data)
    assert pool.idle_bytes == 2 * MEBIBYTE


def test_what_comes_back_beyond_the_limit_is_given_to_the_system():
    pool = Pool(max_idle_bytes=2 * MEBIBYTE)
    lent = [pool.take(MEBIBYTE) for _ in range(5)]
    lent.clear()
    assert pool.idle_bytes == 2 * MEBIBYTE


def test_a_system_that_has_no_huge_pages_gives_buffers_too(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # EINVAL, as where the kernel has none
    assert Pool().take(4 * MEBIBYTE).size == 4 * MEBIBYTE


@pytest.mark.parametrize(
    "alias", [jnp.from_dlpack, lambda x: jax.device_put(x, may_alias=True)], ids=["from_dlpack", "device_put"]
)
def test_a_computation_in_flight_does_not_see_what_is_written_after_it(alias):
    """Everybody lets go of the received array while it is read, and the next frames are received meanwhile."""
    pool = Pool()
    ones = as_float32(pool.take(4 * MEBIBYTE))
    ones[:] = 1.0
    address = ones.ctypes.data
    x = alias(ones)
    assert x.unsafe_buffer_pointer() == address, "JAX has copied it"

    @jax.jit
    def slow_sum(x):  # reads all of x in each of many passes
        return jax.lax.fori_loop(0, 60, lambda i, s: s + jnp.sum(x * jnp.cos(0.0 * (x + i))), 0.0)

    expected = 60.0 * ones.size
    assert slow_sum(x) == pytest.approx(expected)
    reused = []
    result = slow_sum(x)
    del x, ones
    while not result.is_ready():
        other = pool.take(4 * MEBIBYTE)
        other[:] = 7
        reused.append(other.ctypes.data)
        del other
    assert result == pytest.approx(expected)
    assert reused, "the computation was over before anything was written"
    assert address not in reused[:-1]  # the last may be taken when it has just ended
    del result
    jax.device_put(np.zeros(1))  # JAX lets go of what it was given at its next call
    gc.collect()
    assert pool.idle_bytes >= 4 * MEBIBYTE
