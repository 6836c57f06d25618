"""Each codec by itself: what is sent, how many bytes of it, what comes back, and which arguments are refused."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdist.codecs import (
    BF16,
    FP8,
    FP16,
    QSGD,
    BlockTopK,
    Int4,
    Int8,
    MajorityVote,
    PowerSGD,
    RandomK,
    Sign,
    TernGrad,
    Threshold,
    TopK,
)
from jaxdist.codecs.bits import pack, random_bits, scale_bits, scale_from, unpack
from jaxdist.codecs.codec import Keys, payload_bytes
from jaxdist.codecs.powersgd import orthonormal
from jaxdist.codecs.sparse import top_k
from jaxdist.codecs.weights import EncodedGather

BLOCKWISE = [
    BF16(),
    FP16(),
    FP8(),
    Int8(),
    Int8(rounding="stochastic"),
    Int4(),
    QSGD(),
    QSGD(4),
    QSGD(2),
    TernGrad(),
    Sign(),
    MajorityVote(),
    BlockTopK(),
    BlockTopK(block=256, values="fp32"),
    RandomK(),
]
WHOLE = [TopK(), TopK(values="fp32"), Threshold(), PowerSGD()]
QUANTISED = [BF16(), FP16(), FP8(), Int8(rounding="stochastic"), Int4(), QSGD(4), TernGrad(), Sign()]
ONE_OF_EACH = [*QUANTISED, MajorityVote(), BlockTopK(), RandomK(0.1), TopK(), Threshold(), PowerSGD()]
SHAPE = (30, 8)  # of most arrays here, since for each shape a codec is compiled anew


def spec_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def keys_of(number: int) -> Keys:
    return Keys(jax.random.key(number), jax.random.key(1000 + number))


@functools.partial(jax.jit, static_argnums=0)
def exchanged(codec, x, state, keys):
    payload, state = codec.encode(x, state, keys)
    return payload, codec.decode(payload, spec_of(x), keys.shared), state


def sent(codec, x, number: int = 0, state=None):
    """(payload, what comes back, new state), of NumPy arrays: operations outside of a jit are compiled one by one."""
    state = codec.init(spec_of(x), jax.random.key(7)) if state is None else state
    return jax.tree.map(np.asarray, exchanged(codec, x, state, keys_of(number)))


def payload_like(codec, spec):
    """What would be sent, without computing it."""
    return jax.eval_shape(lambda x: exchanged(codec, x, codec.init(spec, jax.random.key(0)), keys_of(0))[0], spec)


def normal(*shape: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("codec", BLOCKWISE + WHOLE, ids=str)
def test_a_payload_has_the_bytes_of_its_formula_and_dtypes_that_travel_as_they_are(codec):
    spec = jax.ShapeDtypeStruct((70, 33), jnp.float32)
    payload = payload_like(codec, spec)
    assert {x.dtype.name for x in jax.tree.leaves(payload)} <= {"uint8", "uint16", "uint32", "float32"}
    own = codec.num_bytes(spec if isinstance(codec, PowerSGD) else spec.size)
    assert own == payload_bytes(codec, spec) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(payload))
    assert codec.takes(spec) == (own < 4 * spec.size)


def test_ratios_are_those_of_the_field():
    # Bits an element, with 16 of a scale for every 256.
    spec = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    bits = {Int8(): 8 + 1 / 16, Int4(): 4 + 1 / 16, TernGrad(): 2 + 1 / 16, Sign(): 1 + 1 / 16}
    bits |= {BlockTopK(): 10 / 1024 * 32, RandomK(): 10 / 1024 * 32, TopK(): round(0.01 * 2**20) / 2**20 * 48}
    for codec, expected in bits.items():
        assert payload_bytes(codec, spec) * 8 / spec.size == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("codec", ONE_OF_EACH, ids=str)
def test_the_same_keys_give_the_same_bits_and_zeros_come_back_as_zeros(codec):
    x = normal(*SHAPE)
    first, again, other = (sent(codec, x, number) for number in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    random = isinstance(codec, QSGD | TernGrad | RandomK) or getattr(codec, "rounding", "") == "stochastic"
    if random:
        assert np.any(first[1] != other[1])
    back = sent(codec, np.zeros_like(x))[1]
    assert back.shape == x.shape
    np.testing.assert_array_equal(back, 0)


@pytest.mark.parametrize("codec", [Int4(), BlockTopK(), Threshold()], ids=str)
def test_a_scalar_is_an_array_of_one(codec):
    back = sent(codec, np.float32(3.0))[1]
    assert back.shape == ()
    assert back == pytest.approx(3, rel=2**-7)


@pytest.mark.parametrize("codec", [Int8(), MajorityVote(), BlockTopK()], ids=str)
def test_blocks_do_not_feel_each_other_so_arrays_put_end_to_end_are_encoded_as_they_are_alone(codec):
    block = codec.block
    x, y = normal(3 * block), np.float32(1e6) * normal(2 * block, number=1)
    alone, _, _ = sent(codec, x)
    together, back, _ = sent(codec, np.r_[x, y])
    of_x = jax.tree.map(lambda a: a[: len(a) * 3 // 5], together)
    jax.tree.map(np.testing.assert_array_equal, of_x, alone)
    poisoned = sent(codec, np.r_[x, np.float32(np.nan), y[1:]])[1]
    np.testing.assert_array_equal(poisoned[: 3 * block], back[: 3 * block])


def test_encoding_rows_at_once_is_encoding_each():
    codec = Int4(rounding="stochastic")
    rows = normal(3, 2 * codec.block * 8)
    keys = Keys(jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.key(1), 3))
    at_once = jax.jit(jax.vmap(lambda x, k: codec.encode(x, (), k)[0]))(rows, keys)
    for i in range(3):
        alone, _, _ = exchanged(codec, rows[i], (), Keys(keys.private[i], keys.shared[i]))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), at_once, alone)


@pytest.mark.parametrize("codec", QUANTISED, ids=str)
def test_what_is_not_finite_stays_visible(codec):
    for bad in (np.nan, np.inf, -np.inf):
        x = normal(*SHAPE)
        x[20, 5] = bad
        assert not np.isfinite(sent(codec, x)[1]).all()


def test_a_scale_is_rounded_up_and_nan_is_nan_whatever_its_bits():
    numbers = {1.0: 0x3F80, np.nextafter(np.float32(1), 2): 0x3F81, 0.0: 0, np.inf: 0x7F80}
    nans = np.array([0x7F800001, 0x7FC00000, 0x7FFF0001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    bits = np.asarray(jax.jit(scale_bits)(np.r_[np.array([*numbers], np.float32), nans.view(np.float32)]))
    np.testing.assert_array_equal(bits[: len(numbers)], [*numbers.values()])
    assert np.isnan(scale_from(jnp.asarray(bits[len(numbers) :]), jnp.float32)).all()


def test_terngrad_clips_by_the_deviation_of_what_is_not_zero():
    x = np.r_[normal(256), normal(16, number=1)]  # 16 elements in a block filled up to 256
    x[:100] = 0
    bits = jax.jit(lambda x: TernGrad(clip=1.5).encode(x, (), keys_of(0))[0]["step"])(x)
    step = (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
    expected = np.array([1.5 * np.sqrt(np.mean(part**2)) for part in (x[100:256], x[256:])])
    assert np.all((expected * (1 - 1e-5) <= step) & (step <= expected * (1 + 2**-7)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_is_lossless_and_fills_every_bit(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64), np.uint8)
    codes[0] = 2**bits - 1
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.shape == (5, 64 * bits // 8)
    np.testing.assert_array_equal(packed[0], 255)
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=1)(packed, bits), codes)


def test_cheap_random_bits_are_uniform_and_independent_between_neighbours_and_keys():
    draws = np.stack([np.asarray(random_bits(jax.random.key(i), (2**16,))) for i in range(3)])
    ones = np.unpackbits(draws.view(np.uint8).reshape(3, -1, 4), axis=2).astype(float) - 0.5
    bound = 5.5 / np.sqrt(2**16)  # standard deviations of a mean of signs; some hundreds are compared
    assert np.abs(2 * ones.mean(axis=1)).max() < bound
    for a, b in [
        (ones[0], ones[1]),
        (ones[1], ones[2]),
        (ones[0][:-1], ones[0][1:]),
        (ones[0][:-256], ones[0][256:]),
    ]:
        assert np.abs(4 * (a * b).mean(axis=0)).max() < bound
    counts = np.bincount(draws[0] >> 24, minlength=256)
    assert ((counts - 256) ** 2 / 256).sum() < 255 + 5 * np.sqrt(2 * 255)  # chi squared


@pytest.mark.parametrize(("codec", "dtype"), [(BF16(), ml_dtypes.bfloat16), (FP16(), np.float16)], ids=str)
def test_casts_round_as_numpy_does(codec, dtype):
    x = normal(5000)
    np.testing.assert_array_equal(sent(codec, x)[1], np.asarray(x).astype(dtype).astype(np.float32))


def test_fp8_rounds_as_ml_dtypes_does_once_the_block_is_scaled():
    x = normal(256)
    payload, back, _ = sent(FP8(), x)
    scale = (np.asarray(payload["scale"]).astype(np.uint32) << 16).view(np.float32)
    assert np.abs(x).max() / 448 <= scale[0] <= np.abs(x).max() / 448 * (1 + 2**-7)
    expected = (np.asarray(x) / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert np.mean(np.asarray(back) == expected) > 0.99  # times 1 / scale is not quite division by it
    np.testing.assert_allclose(back, x, rtol=2**-4, atol=float(scale[0]) * 2**-10)


@pytest.mark.parametrize(("width", "k"), [(1024, 10), (1000, 1), (250, 31)])
def test_top_k_is_numpys_partition(width, k):
    x = np.exp(3 * normal(7, width)) * np.sign(normal(7, width, number=2))
    values, indices = jax.jit(top_k, static_argnums=1)(x, k)
    expected = np.argpartition(-np.abs(x), k - 1, axis=1)[:, :k]
    np.testing.assert_array_equal(np.sort(indices), np.sort(expected))
    np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(indices), 1))


@pytest.mark.parametrize(
    ("codec", "size", "dtype"),
    [
        (BlockTopK(block=256), 900, "uint8"),
        (BlockTopK(), 2000, "uint16"),
        (TopK(), 256, "uint8"),
        (TopK(), 300, "uint16"),
        (TopK(), 70_000, "uint32"),
    ],
)
def test_the_narrowest_indices_are_sent(codec, size, dtype):
    assert payload_like(codec, jax.ShapeDtypeStruct((size,), jnp.float32))["indices"].dtype.name == dtype


@pytest.mark.parametrize("n", [50, 100_000])
def test_threshold_sends_about_the_ratio_and_only_what_is_large(n):
    x = normal(n)
    payload, back, _ = sent(Threshold(0.05, values="fp32"), x)
    kept, most = np.flatnonzero(back), round(0.05 * n)
    assert most // 3 <= len(kept) <= most == len(payload["values"])
    np.testing.assert_array_equal(np.asarray(back)[kept], np.asarray(x)[kept])
    assert np.abs(back)[kept].min() >= np.sort(np.abs(x))[-3 * most]


def test_over_threshold_every_element_has_its_turn():
    # All are equally large, so all are above the threshold and a run of 100 in 1000 is sent.
    x, codec = np.ones(1000, np.float32), Threshold(0.1, values="fp32")
    times = sum(np.asarray(sent(codec, x, i)[1]) for i in range(200))
    assert times.sum() == 200 * 100
    assert np.abs(times - 20).max() < 5.5 * np.sqrt(200 * 0.1 * 0.9)


@pytest.mark.parametrize("codec", [BlockTopK(), TopK(), Threshold()], ids=str)
def test_adding_a_payload_is_adding_what_it_decodes_to(codec):
    total, x = normal(*SHAPE, number=1), normal(*SHAPE)
    payload, decoded, _ = sent(codec, x)
    assert decoded.any()
    added = jax.jit(lambda total, payload: codec.add(total, payload, keys_of(0).shared))(total, payload)
    np.testing.assert_array_equal(added, total + decoded)


def test_random_k_sends_every_element_with_the_same_probability():
    codec, draws = RandomK(0.1, scaled=False, block=40), 3000
    decoded = jax.jit(jax.vmap(lambda i: _random_k(codec, jnp.ones(70), i)))(jnp.arange(draws))
    times = np.asarray(decoded).sum(0)
    assert set(np.unique(decoded)) == {0, 1}
    p = codec.num_sent / codec.block
    assert np.abs(times - draws * p).max() < 4.8 * np.sqrt(draws * p * (1 - p))  # 70 elements, 1e-4 in all


def _random_k(codec, x, number):
    keys = Keys(jax.random.key(0), jax.random.fold_in(jax.random.key(9), number))
    return codec.decode(codec.encode(x, (), keys)[0], spec_of(x), keys.shared)


def test_payloads_of_random_k_add_up():
    codec, x, y = RandomK(0.1), normal(*SHAPE), normal(*SHAPE, number=1)
    (px, dx, _), (py, dy, _) = sent(codec, x), sent(codec, y)
    decoded = jax.jit(lambda payload: codec.decode(payload, spec_of(x), keys_of(0).shared))(px + py)
    np.testing.assert_allclose(decoded, dx + dy, rtol=1e-5, atol=1e-5)


def test_the_majority_decides_ties_fall_both_ways_and_the_absent_do_not_vote():
    codec = MajorityVote(8)
    workers = [[1, -2, 3, -4, 5, -6, 7, -8], [1, -2, -3, 4, 5, -6, -7, 8], [0] * 8]  # the third abstains
    rows = np.asarray([[*w, *[0] * 8] for w in workers], np.float32)  # nobody votes on the second block
    signs = np.stack([sent(codec, row)[1] for row in rows])
    combine, keys = jax.jit(jax.vmap(codec.combine, (None, None, 0))), jax.random.split(jax.random.key(0), 400)
    votes = np.asarray(combine(signs.sum(0), np.abs(signs).sum(0), keys))
    agreed, tied = [0, 1, 4, 5], [2, 3, 6, 7]
    np.testing.assert_array_equal(votes[:, agreed], np.broadcast_to([1, -1, 1, -1], (400, 4)))
    assert set(np.unique(votes[:, tied])) == {-1, 1}
    assert np.abs(votes[:, tied].mean(0)).max() < 4.5 / 20
    assert not votes[:, 8:].any()


def test_a_zero_among_others_votes_at_random():
    codec, x = MajorityVote(), normal(256)
    x[10] = 0
    votes = np.asarray(
        jax.jit(jax.vmap(lambda k: codec.encode(jnp.asarray(x), (), Keys(k, k))[0]["positive"]))(
            jax.random.split(jax.random.key(0), 400)
        )
    )
    back = unpack(jnp.asarray(votes[:, 0]), 1)[:, 10]
    assert abs(back.mean() - 0.5) < 4.5 * 0.5 / 20


@pytest.mark.parametrize("codec", [Int8(), Int4(), FP8()], ids=str)
def test_every_device_gathers_the_same_whole_of_shards_that_are_no_whole_blocks(codec):
    x = normal(96, 8)  # halves of 96 x 4, one and a half blocks
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    sharded, one_each = PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")
    gather = jax.shard_map(
        lambda shard: EncodedGather(codec)(shard, "fsdp", 1)[None], mesh=mesh, in_specs=sharded, out_specs=one_each
    )
    expected = np.concatenate([sent(codec, half)[1] for half in (x[:, :4], x[:, 4:])], axis=1)
    for whole in np.asarray(jax.jit(gather)(x)):
        np.testing.assert_array_equal(whole, expected)


def test_power_sgd_cuts_where_factors_are_smallest_and_leaves_small_arrays_alone():
    def shapes(shape, stacked=0):
        payload = payload_like(PowerSGD(2, stacked), jax.ShapeDtypeStruct(shape, jnp.float32))
        return [payload["p"].shape, payload["q"].shape]

    assert shapes((3, 3, 64, 128)) == [(576, 2), (128, 2)]
    assert shapes((12, 64, 64), stacked=1) == [(12, 64, 2), (12, 64, 2)]
    for shape, takes in [
        ((64, 64), True),
        ((8, 8), False),
        ((9, 9), True),
        ((1000,), False),
        ((1, 1000), False),
        ((), False),
    ]:
        assert PowerSGD(4).takes(jax.ShapeDtypeStruct(shape, jnp.float32)) is takes
    assert not PowerSGD(4, stacked=1).takes(jax.ShapeDtypeStruct((12, 1000), jnp.float32)), "stacked biases"


def test_power_sgd_of_stacked_layers_is_that_of_each():
    x, codec = normal(3, 20, 30), PowerSGD(2, stacked=1)
    state = codec.init(spec_of(x), jax.random.key(0))
    _, back, _ = sent(codec, x, state=state)
    for i in range(3):
        np.testing.assert_allclose(back[i], sent(PowerSGD(2), x[i], state=state[i])[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["zeros", "one column thrice", "normal", "tiny"])
def test_columns_are_orthonormal_whatever_they_were(of):
    p = {
        "zeros": np.zeros((30, 3), np.float32),
        "one column thrice": np.tile(normal(30, 1), 3),
        "tiny": np.float32(1e-30) * normal(30, 3),
    }
    q = np.asarray(jax.jit(orthonormal)(p.get(of, normal(30, 3))))
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-6)


def test_power_sgd_over_workers_is_that_of_the_mean_in_two_reductions():
    xs = [normal(4, 20, 30), normal(4, 3, 3, 8, 16)]
    codec = PowerSGD(3)
    states = [codec.init(spec_of(x[0]), jax.random.key(i)) for i, x in enumerate(xs)]

    def reduce(xs):
        return codec.reduce(xs, states, [], "data")

    means, contributed, new = jax.tree.map(np.asarray, jax.jit(jax.vmap(reduce, axis_name="data"))(xs))
    program = jax.make_jaxpr(reduce, axis_env=[("data", 4)])([x[0] for x in xs])
    assert sum("psum" in equation.primitive.name for equation in program.eqns) == 2
    for x, state, mean, own, q in zip(xs, states, means, contributed, new, strict=True):
        _, expected, expected_q = sent(codec, x.mean(0), state=state)
        for worker in range(4):
            np.testing.assert_allclose(mean[worker], expected, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(q[worker], expected_q, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(own.mean(0), mean[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codec", BLOCKWISE + WHOLE, ids=str)
def test_arrays_of_integers_and_empty_ones_are_refused(codec):
    for x, named in [(jnp.arange(6), "int32 of shape \\(6,\\)"), (jnp.zeros((0, 3)), "float32 of shape \\(0, 3\\)")]:
        with pytest.raises(ValueError, match=named):
            codec.encode(x, (), keys_of(0))
        assert not codec.takes(spec_of(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockTopK(0.0), "ratio is 0.0; it must be above 0 and below 1"),
        (lambda: TopK(1.0), "ratio is 1.0"),
        (lambda: RandomK(float("nan")), "ratio is nan"),
        (lambda: Threshold(sample=2), "sample is 2"),
        (lambda: BlockTopK(values="fp16"), "values is 'fp16'; it must be one of 'bf16', 'fp32'"),
        (lambda: BlockTopK(block=0), "block is 0; a multiple of 1"),
        (lambda: Int4(block=7), "block is 7; a multiple of 2"),
        (lambda: TernGrad(block=6), "a multiple of 4"),
        (lambda: Sign(block=100), "a multiple of 8"),
        (lambda: QSGD(bits=3), "bits is 3; it must be one of 8, 4, 2"),
        (lambda: Int8(rounding="up"), "rounding is 'up'"),
        (lambda: TernGrad(clip=0.0), "clip is 0.0"),
        (lambda: PowerSGD(0), "rank is 0; it must be at least 1"),
        (lambda: PowerSGD(stacked=-1), "stacked is -1"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()
