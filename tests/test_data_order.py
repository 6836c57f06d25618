"""The global order: a permutation an epoch, the same for everybody."""

import hashlib
import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.config.errors import UserError
from jaxdist.data.arrays import Arrays
from jaxdist.data.order import derive_key, permute
from jaxdist.data.split import split
from jaxdist.data.stream import Stream


class Numbered:
    """A source whose samples are their ids, of any length, that counts what is read."""

    classes = None
    vocabulary = None

    def __init__(self, length, split_block=1):
        self.length, self.split_block = length, split_block
        self.features = Arrays({"x": np.zeros((1, 2), np.float32)}).features
        self.read = []

    def __len__(self):
        return self.length

    def get(self, ids):
        self.read.extend(ids.tolist())
        return {"x": np.stack([ids, -ids], axis=1).astype(np.float32)}


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.text(max_size=5))
def test_permute_is_a_bijection_for_every_length_and_key(length, seed, purpose):
    image = permute(np.arange(length), length, derive_key(seed, purpose))
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(length))


@settings(deadline=None, max_examples=30)
@given(st.integers(2**20, 2**61), st.integers(0, 2**32), st.data())
def test_permute_of_huge_lengths_stays_inside_and_is_injective(length, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=2, unique=True)))
    image = permute(positions, length, derive_key(seed, "x"))
    assert image.min() >= 0
    assert image.max() < length
    assert len(set(image.tolist())) == len(positions)


def test_permute_is_random_access():
    key = derive_key(3, "x")
    whole = permute(np.arange(1000), 1000, key)
    some = np.array([[999, 0], [7, 7]])
    np.testing.assert_array_equal(permute(some, 1000, key), whole[some])


def feistel_by_hand(value, length, seed, *purpose):
    """Black and Rogaway's network in Python's unbounded integers, one value at a time."""
    text = "\x1f".join([str(seed), *(f"{type(p).__name__}:{p}" for p in purpose)])
    digest = hashlib.blake2b(text.encode(), digest_size=64).digest()
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    while True:
        half, other = divmod(value, b)
        sizes = a, b
        for r in range(8):
            hashed = (other * 0xBF58476D1CE4E5B9 + int.from_bytes(digest[8 * r : 8 * r + 8], "little")) % 2**64
            hashed = (hashed ^ hashed >> 32) * 0xFF51AFD7ED558CCD % 2**64
            hashed = (hashed ^ hashed >> 32) >> 32
            half, other, sizes = other, (half + hashed) % sizes[0], sizes[::-1]
        value = half * b + other
        if value < length:
            return value


@pytest.mark.parametrize("length", [257, 1000, 60_000, 10**9, 2**40 + 1])
def test_the_order_is_the_same_on_every_platform_and_numpy(length):
    """A resumed run depends on it; overflow and promotion rules of NumPy must not show."""
    positions = [0, 1, 2, 255, length // 2, length - 1]
    by_hand = [feistel_by_hand(p, length, 7, "order", "train", 3) for p in positions]
    assert permute(np.array(positions), length, derive_key(7, "order", "train", 3)).tolist() == by_hand


def test_all_permutations_of_four_are_equally_likely():
    draws = 24 * 400
    seen = Counter(tuple(permute(np.arange(4), 4, derive_key(s, "u")).tolist()) for s in range(draws))
    chi_square = sum((seen[p] - 400) ** 2 / 400 for p in permutations(range(4)))
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)


def test_every_id_is_equally_likely_at_every_place_and_neighbours_are_unrelated():
    length, draws = 300, 1500
    images = np.stack([permute(np.arange(length), length, derive_key(s, "u")) for s in range(draws)])
    bound = (length - 1) + 5 * math.sqrt(2 * (length - 1))
    for place in (0, 1, 150, 299):
        counts = np.bincount(images[:, place], minlength=length)
        assert ((counts - draws / length) ** 2 / (draws / length)).sum() < bound
    steps = np.bincount((np.diff(images, axis=1) % length).ravel(), minlength=length)[1:]
    expected = steps.sum() / (length - 1)
    assert ((steps - expected) ** 2 / expected).sum() < bound


def test_every_epoch_gives_every_sample_once_in_another_order():
    stream = Stream.of(Numbered(500), None, seed=1)
    epochs = [stream.samples(e, 0, 500)["sample_id"] for e in range(3)]
    for ids in epochs:
        np.testing.assert_array_equal(np.sort(ids), np.arange(500))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_seed_and_name_change_the_order_and_nothing_else_does():
    source = Numbered(500)
    first = Stream.of(source, None, 1).at(0, 500)["sample_id"]
    np.testing.assert_array_equal(first, Stream.of(Numbered(500), None, 1).at(0, 500)["sample_id"])
    assert not np.array_equal(first, Stream.of(source, None, 2).at(0, 500)["sample_id"])
    assert not np.array_equal(first, Stream.of(source, None, 1, "client 3").at(0, 500)["sample_id"])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 130))
def test_a_batch_that_straddles_epochs_is_the_concatenation_of_their_parts(length, position, count):
    stream = Stream.of(Numbered(length), None, seed=5)
    one_by_one = [stream.samples(p // length, p % length, 1) for p in range(position, position + count)]
    batch = stream.at(position, count)
    for field, array in batch.items():
        np.testing.assert_array_equal(array, np.concatenate([row[field] for row in one_by_one]))


def test_rows_carry_their_sample_and_its_id():
    batch = Stream.of(Numbered(100), np.array([5, 50, 99]), seed=0).at(0, 3)
    assert sorted(batch["sample_id"]) == [5, 50, 99]
    np.testing.assert_array_equal(batch["x"][:, 0], batch["sample_id"])
    assert batch["sample_id"].dtype == np.int32
    assert batch["weight"].tolist() == [1, 1, 1]


def test_sample_ids_of_a_huge_source_are_not_cut_off():
    stream = Stream.of(Numbered(2**40), None, seed=0)
    ids = stream.at(0, 64)["sample_id"]
    assert ids.dtype == np.int64
    assert ids.max() > 2**32


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_read_by_hosts_are_together_the_global_batch_and_each_host_reads_only_its_own(hosts):
    batch = Stream.of(Numbered(1000), None, seed=2).at(960, 64)
    parts = []
    for host in range(hosts):
        source = Numbered(1000)
        rows = 960 + np.arange(host * 64 // hosts, (host + 1) * 64 // hosts)
        parts.append(Stream.of(source, None, seed=2).rows(rows))
        assert len(source.read) == 64 // hosts
    for field, array in batch.items():
        np.testing.assert_array_equal(array, np.concatenate([part[field] for part in parts]))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 2000), st.integers(1, 70), st.floats(0.01, 0.9), st.integers(0, 9))
def test_split_is_disjoint_complete_and_fixed_by_the_seed(length, block, fraction, seed):
    source = Numbered(length, block)
    train, validation = split(source, fraction, seed)
    kept, held_out = (part.ids(np.arange(len(part))) for part in (train, validation))
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(length))
    assert len(kept) > 0
    assert len(held_out) > 0
    again = split(Numbered(length, block), fraction, seed)[1]
    np.testing.assert_array_equal(held_out, again.ids(np.arange(len(again))))


def test_split_keeps_the_fraction_and_depends_on_the_seed():
    first, second = (split(Numbered(10_000), 0.1, seed)[1] for seed in (0, 1))
    assert len(first) == len(second) == 1000
    common = set(first.ids(np.arange(1000))) & set(second.ids(np.arange(1000)))
    assert 50 < len(common) < 160  # 100 by chance


def test_neighbours_stay_on_one_side_of_the_split():
    train, validation = split(Numbered(6400, split_block=64), 0.1, 0)
    assert len(validation) == 640
    blocks = validation.ids(np.arange(640)).reshape(-1, 64)
    np.testing.assert_array_equal(blocks - blocks[:, :1], np.tile(np.arange(64), (10, 1)))
    assert (blocks[:, 0] % 64 == 0).all()
    assert len(train) == 5760


def test_split_of_a_billion_samples_takes_no_memory_and_no_time():
    train, validation = split(Numbered(10**9, 64), 0.001, 0)
    ids = Stream(Numbered(10**9, 64), train, 0).ids(np.arange(10))
    assert len(set(ids.tolist())) == 10
    assert len(train) + len(validation) == 10**9


def test_one_sample_cannot_be_split():
    with pytest.raises(UserError, match="1 samples cannot be split"):
        split(Numbered(1), 0.1, 0)


def test_padded_rows_have_weight_zero_and_the_rest_is_every_sample_once():
    stream = Stream.of(Numbered(10), None, seed=0)
    batches = [stream.padded(start, 4, 4) for start in (0, 4, 8)]
    assert {len(batch["x"]) for batch in batches} == {4}
    weight = np.concatenate([batch["weight"] for batch in batches])
    ids = np.concatenate([batch["sample_id"] for batch in batches])
    assert weight.tolist() == [1] * 10 + [0] * 2
    assert sorted(ids[weight == 1]) == list(range(10))
