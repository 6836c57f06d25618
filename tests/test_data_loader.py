"""The loader: the stream's rows on the devices, whatever the layout."""

import gc
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.config.errors import UserError
from jaxdist.data.arrays import Arrays
from jaxdist.data.loader import Loader, evaluation_batches
from jaxdist.data.placement import Placement
from jaxdist.data.stream import Stream

ROW_BYTES = 28 * 28 + 4


def images(samples=200):
    random = np.random.default_rng(0)
    x = random.integers(256, size=(samples, 28, 28, 1), dtype=np.uint8)
    return Arrays({"x": x, "y": np.arange(samples, dtype=np.int32)}, classes=samples)


SPLIT = P(None, "data")


def sharding(shape=(8,), axes=("data",), spec=SPLIT):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return NamedSharding(jax.sharding.Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes)), spec)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxdist-loader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not loader_threads()


LAYOUTS = {
    "1 device": sharding((1,)),
    "8 devices": sharding(),
    "2 of 8 devices": sharding((2,)),
    "data and fsdp": sharding((2, 4), ("data", "fsdp"), P(None, ("data", "fsdp"))),
    "replicated over tensor": sharding((4, 2), ("data", "tensor"), P(None, "data")),
    "replicated": sharding(spec=P()),
}


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_batches_are_the_streams_rows_in_order_on_any_layout(layout, accumulation_steps):
    stream = Stream.of(images(), None, seed=3)
    with Loader(stream, layout, 32, accumulation_steps) as loader:
        for step in range(20):  # more than one group, more than one epoch
            batch = next(loader)
            expected = stream.at(step * 32, 32)
            assert batch.keys() == expected.keys()
            for field, array in batch.items():
                assert array.sharding.is_equivalent_to(layout, array.ndim)
                assert array.dtype == expected[field].dtype
                assert array.shape[:2] == (accumulation_steps, 32 // accumulation_steps)
                np.testing.assert_array_equal(np.asarray(array).reshape(32, *array.shape[2:]), expected[field])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("small", [True, False])
def test_joining_shards_of_each_device_gives_what_one_transfer_gives(layout, small):
    """The path that a job of several processes takes."""
    rows = Stream.of(images(), None, seed=3).at(0, 32)
    placement = Placement(layout, 32, 2)
    whole = placement.put(rows)
    parts = {name: array.reshape(2, 16, *array.shape[1:]) for name, array in rows.items()}
    joined = placement.put_by_device(parts, small)
    for field, array in whole.items():
        assert joined[field].sharding.is_equivalent_to(array.sharding, array.ndim)
        np.testing.assert_array_equal(np.asarray(joined[field]), np.asarray(array))


@pytest.mark.parametrize("devices", [1, 8])
def test_batches_arrive_where_implicit_transfers_are_forbidden(devices):
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with Loader(Stream.of(images(), None, 0), sharding((devices,)), 16) as loader:
            batch = next(loader)
    finally:
        jax.config.update("jax_transfer_guard", None)
    expected = Stream.of(images(), None, 0).at(0, 16)["sample_id"]
    np.testing.assert_array_equal(np.ravel(batch["sample_id"]), expected)


def test_large_batches_take_the_other_path_to_one_device_and_are_the_same():
    source = Arrays({"x": np.arange(100 * 2**14, dtype=np.float32).reshape(100, -1), "y": np.arange(100)})
    stream = Stream.of(source, None, 0)
    with Loader(stream, sharding((1,)), 32) as loader:
        np.testing.assert_array_equal(np.asarray(next(loader)["x"])[0], stream.at(0, 32)["x"])


@pytest.mark.parametrize("start", [1, 7, 33])
def test_a_loader_resumed_at_a_step_gives_what_the_uninterrupted_one_gives(start):
    stream = Stream.of(images(), None, seed=3)
    with Loader(stream, sharding(), 16) as whole, Loader(stream, sharding(), 16, 1, 16 * start) as resumed:
        for _ in range(start):
            next(whole)
        for _ in range(5):
            np.testing.assert_array_equal(next(whole)["sample_id"], next(resumed)["sample_id"])


def test_bytes_read_count_the_rows_of_the_batches_given():
    with Loader(Stream.of(images(), None, seed=3), sharding(), 16) as loader:
        assert loader.bytes_read == 0
        for _ in range(3):
            next(loader)
        assert loader.bytes_read == 3 * 16 * ROW_BYTES


class Failing(Arrays):
    """A source that fails at its third reading."""

    def __init__(self, error):
        super().__init__(images().fields)
        self.error, self.readings = error, 0

    def get(self, ids):
        self.readings += 1
        if self.readings == 3:
            raise self.error
        return super().get(ids)


def test_an_exception_of_the_source_is_raised_by_next_after_the_batches_before_it():
    loader = Loader(Stream.of(Failing(UserError("data: disk gone")), None, 0), sharding(), 16)
    given = []
    with pytest.raises(UserError, match="disk gone"):
        given.extend(loader)  # endless, but for the error
    assert given
    with pytest.raises(StopIteration):
        next(loader)


def test_close_ends_the_thread_at_once_and_twice_is_once():
    loader = Loader(Stream.of(images(), None, 0), sharding(), 16)
    next(loader)
    assert loader_threads()
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < 1
    with pytest.raises(StopIteration):
        next(loader)


def test_a_forgotten_loader_ends_its_thread():
    loader = Loader(Stream.of(images(), None, 0), sharding(), 16)
    next(loader)
    del loader
    gc.collect()
    assert not loader_threads()


class Slow(Arrays):
    def get(self, ids):
        time.sleep(0.02)
        return super().get(ids)


def test_batches_are_prepared_while_the_consumer_works():
    big = {"x": np.zeros((64, 2**16), np.uint8)}  # one step a group
    with Loader(Stream.of(Slow(big), None, 0), sharding(), 16, prefetch=2) as loader:
        next(loader)
        waited = loader.wait_seconds
        assert waited > 0.01
        for _ in range(5):
            time.sleep(0.1)
            next(loader)
        assert loader.wait_seconds - waited < 0.05


@pytest.mark.parametrize(("batch_size", "accumulation_steps", "multiple"), [(12, 1, 8), (16, 4, 32), (10, 4, 32)])
def test_a_batch_that_does_not_divide_is_refused_with_what_would(batch_size, accumulation_steps, multiple):
    with pytest.raises(UserError, match=f"batch of {batch_size} .* must be a multiple of {multiple}"):
        Loader(Stream.of(images(), None, 0), sharding(), batch_size, accumulation_steps)


@pytest.mark.parametrize("samples", [None, 50])
def test_evaluation_sees_every_sample_once_in_batches_of_one_shape(samples):
    stream = Stream.of(images(), None, seed=3)
    batches = list(evaluation_batches(stream, sharding(), 32, 2, samples))
    assert {batch["x"].shape for batch in batches} == {(2, 16, 28, 28, 1)}
    ids = np.concatenate([np.ravel(batch["sample_id"]) for batch in batches])
    weight = np.concatenate([np.ravel(batch["weight"]) for batch in batches])
    every = 200 // (samples or 200)  # fewer than all are spread over the whole
    assert sorted(ids[weight == 1]) == list(range(0, 200, every))
    assert len(batches) == -(-(samples or 200) // 32)
