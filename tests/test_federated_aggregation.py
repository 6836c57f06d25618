"""Rules over a cohort's messages, and attacks on them: against NumPy and SciPy, and what they promise."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from pydantic import TypeAdapter, ValidationError

from jaxdist.config import aggregation as options
from jaxdist.federated.aggregation import (
    Gaussian,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    Scaled,
    TrimmedMean,
    aggregate,
    attack_of,
    clip,
    flip_labels,
    malicious_clients,
    rule_of,
)
from jaxdist.federated.aggregation.coordinates import sort_columns, weighted_median

SLOTS = 16
RULES = {
    "mean": Mean(),
    "trimmed_mean": TrimmedMean(0.3),
    "median": Median(),
    "krum": Krum(4),
    "multi_krum": Krum(4, num_selected=None),
    "geometric_median": GeometricMedian(32),
}


SIZE = 1100  # two blocks
shortened = jax.jit(clip)


@jax.jit
def all_rules(messages, weights):
    return {name: aggregate(rule, messages, weights) for name, rule in RULES.items()}


def by_all(messages, weights=None, slots=SLOTS):
    """Every rule's [P] of [S, P] on one device; to compile once, zeros and absent slots fill up what is smaller."""
    rows, columns = messages.shape
    weights = np.ones(rows, np.float32) if weights is None else weights
    found = all_rules(
        np.pad(messages, ((0, slots - rows), (0, SIZE - columns))),
        np.pad(weights, (0, slots - rows)).astype(np.float32),
    )
    return {name: np.asarray(x)[:columns] for name, x in found.items()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_absent(seed=0, slots=SLOTS, num_present=11):
    weights = np.zeros(slots, np.float32)
    places = np.random.default_rng(seed).permutation(slots)[:num_present]
    weights[places] = 1
    return weights


def plain_krum(messages, num_byzantine, num_selected):
    """Of [n, P] in float64, as the paper words it: which messages are selected."""
    n, scores = len(messages), []
    for i in range(n):
        distances = sorted(float(np.sum((messages[i] - messages[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(distances[: n - num_byzantine - 2]))
    return sorted(range(n), key=lambda i: scores[i])[:num_selected]


@pytest.mark.parametrize("num_present", [5, 10, 11, 16])
def test_rules_are_those_of_numpy_scipy_and_a_plain_loop(num_present):
    messages = normal(SLOTS, SIZE) * np.linspace(1, 2, SLOTS, dtype=np.float32)[:, None]
    weights = some_absent(num_present, num_present=num_present) * np.arange(1, SLOTS + 1, dtype=np.float32)
    there = messages[weights > 0].astype(np.float64)
    found = by_all(messages, weights)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    same(found["mean"], np.average(there, axis=0, weights=weights[weights > 0]))
    same(found["trimmed_mean"], scipy.stats.trim_mean(there, 0.3, axis=0))
    same(found["median"], np.median(there, axis=0))
    if num_present >= 2 * 4 + 3:
        np.testing.assert_array_equal(found["krum"], there[plain_krum(there, 4, 1)[0]].astype(np.float32))
        same(found["multi_krum"], there[plain_krum(there, 4, num_present - 6)].mean(axis=0))


def test_trimming_leaves_out_as_many_as_the_fraction_says_despite_its_rounding():
    assert 0.29 * 100 < 29
    assert options.num_trimmed(0.29, 100) == 29
    assert [options.num_trimmed(0.2, n) for n in (4, 5, 9, 10)] == [0, 1, 1, 2]


@pytest.mark.parametrize("weighted", [False, True])
def test_geometric_median_is_what_an_optimizer_finds(weighted):
    messages = np.random.default_rng(3).standard_normal((9, 4)) * 3 + 1
    messages[:2] += 40
    weights = np.arange(1.0, 10) if weighted else np.ones(9)

    def distance_sum(v):
        return float(np.sum(weights * np.linalg.norm(messages - v, axis=1)))

    best = scipy.optimize.minimize(distance_sum, np.median(messages, axis=0), tol=1e-12)
    with jax.enable_x64(True):
        run = jax.jit(aggregate, static_argnums=0)
        after = {n: np.asarray(run(GeometricMedian(n), messages, weights)) for n in (16, 100)}
    np.testing.assert_allclose(after[100], best.x, atol=1e-5)
    assert distance_sum(after[100]) <= best.fun * (1 + 1e-12)
    assert distance_sum(after[16]) < best.fun * (1 + 1e-4)


def test_geometric_median_may_be_one_of_the_messages():
    messages = np.concatenate([np.zeros((1, 6)), np.eye(6), -np.eye(6)]).astype(np.float32)
    np.testing.assert_allclose(by_all(messages)["geometric_median"], 0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 7, 21])
def test_the_sorting_network_sorts(rows):
    columns = np.concatenate([normal(rows, 50), np.full((rows, 1), np.inf), np.sign(normal(rows, 9))], axis=1)
    columns[rows // 2, :5] = -np.inf
    columns = columns.astype(np.float32)
    places = np.broadcast_to(np.arange(rows)[:, None], columns.shape)
    ordered, places = jax.jit(sort_columns)(columns, places)
    np.testing.assert_array_equal(ordered, np.sort(columns, 0))
    came_along = np.take_along_axis(columns, np.asarray(places), 0)
    np.testing.assert_array_equal(np.where(ordered < np.inf, came_along, np.inf), ordered)


def test_the_weighted_median_is_that_of_as_many_copies():
    values = normal(9, 40)
    weights = np.random.default_rng(1).integers(0, 5, 9)
    median = jax.jit(weighted_median)
    copies = np.repeat(values, weights, axis=0)
    np.testing.assert_allclose(median(values, np.float32(weights)), np.median(copies, axis=0), rtol=1e-6)
    values[weights == 0] = np.nan
    values[np.argmax(weights)] = np.nan  # there, and the largest
    copies = np.nan_to_num(np.repeat(values, weights, axis=0), nan=np.inf)
    np.testing.assert_allclose(median(values, np.float32(weights)), np.median(copies, axis=0), rtol=1e-6)


def everything_on(num_devices, messages, weights):
    """Every rule's result, from messages that are split over so many devices."""
    mesh = Mesh(np.asarray(jax.devices()[:num_devices]), ("clients",))

    def run(messages, weights):
        return {name: aggregate(rule, messages, weights, "clients") for name, rule in RULES.items()}

    split, whole = PartitionSpec("clients"), PartitionSpec()
    program = jax.shard_map(run, mesh=mesh, in_specs=(split, split), out_specs=whole, check_vma=False)
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(program)(messages, weights))


@pytest.fixture(scope="module")
def model_sized():
    """Messages of a small model: more coordinates than 64 of the shortest blocks hold, and no multiple of them."""
    messages = {"kernel": normal(SLOTS, 300, 231), "bias": normal(SLOTS, 231, seed=1), "scale": normal(SLOTS, seed=2)}
    weights = some_absent(num_present=13) * np.random.default_rng(4).uniform(1, 9, SLOTS).astype(np.float32)
    return messages, weights, all_rules(messages, weights)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_any_number_of_devices_gives_the_same_bits(num_devices, model_sized):
    messages, weights, whole = model_sized
    found = everything_on(num_devices, messages, weights)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_no_device_holds_all_messages_whole(model_sized):
    messages, weights, _ = model_sized
    mesh = Mesh(np.asarray(jax.devices()), ("clients",))
    run = functools.partial(aggregate, Median(), axis="clients")
    split = PartitionSpec("clients")
    program = jax.shard_map(run, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec(), check_vma=False)
    jaxpr = jax.make_jaxpr(program)(messages, weights)
    size = sum(x[0].size for x in jax.tree.leaves(messages))

    def largest(jaxpr):
        own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = [sub for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
        return max([0, *own, *map(largest, inner)])

    assert largest(jaxpr.jaxpr) < 1.1 * max(SLOTS * size / 8, size)


def test_absent_slots_are_as_if_they_were_not_there():
    messages, weights = normal(SLOTS, SIZE), some_absent(5, num_present=12) * 2.5
    hostile = messages.copy()
    hostile[weights == 0] = np.nan
    found, alone = by_all(hostile, weights), by_all(messages[weights > 0], weights[weights > 0], slots=12)
    for name in RULES:
        np.testing.assert_array_equal(found[name], alone[name])
        np.testing.assert_array_equal(by_all(messages, weights * 0)[name], 0)


def test_the_cohort_may_change_without_a_retrace():
    traces = []

    def counted(messages, weights):
        traces.append(1)
        return [aggregate(rule, messages, weights) for rule in (Median(), TrimmedMean(0.2), Krum(1))]

    program, messages = jax.jit(counted), normal(SLOTS, 20)
    for num_present in (5, 9, 16):
        program(messages, some_absent(num_present=num_present))
    assert len(traces) == 1


def test_the_order_of_clients_does_not_matter():
    messages, weights = normal(SLOTS, 700), np.arange(SLOTS, dtype=np.float32)
    order = np.random.default_rng(8).permutation(SLOTS)
    found, other = by_all(messages, weights), by_all(messages[order], weights[order])
    for name in RULES:
        np.testing.assert_allclose(other[name], found[name], rtol=1e-5, atol=1e-6)


def test_krum_takes_the_first_of_equals():
    clients = np.repeat(np.asarray([[1.0], [2.0]], np.float32), 8, axis=0)  # two camps with the same scores
    assert by_all(clients)["krum"] == 1
    assert by_all(clients[::-1])["krum"] == 2


LIES = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 1e20, 1e4, 1e3, -7.0, 0.3])
PLOTS = st.sampled_from(["apart", "alike", "corner", "one of them", "a little beyond"])


def lies_of(plot, lies, honest):
    """[n, 5]: what liars send. Those that plot are all at one point, some as far out as an honest one may be."""
    centre = honest.mean(axis=0)
    farthest = honest[np.argmax(np.linalg.norm(honest - centre, axis=1))]
    points = {
        "alike": lies[0],
        "corner": honest.max(axis=0),
        "one of them": farthest,
        "a little beyond": centre + 1.01 * (farthest - centre),
    }
    return lies if plot == "apart" else np.broadcast_to(points[plot], lies.shape)


@settings(max_examples=100, deadline=None)
@given(PLOTS, st.lists(LIES, min_size=20, max_size=20), st.integers(0, 2**32 - 1), st.integers(11, SLOTS))
def test_robust_rules_stay_with_the_honest_whatever_others_send(plot, lies, seed, num_present):
    rng = np.random.default_rng(seed)
    num_liars = min(4, int(0.3 * num_present))
    messages, weights = normal(SLOTS, 5, seed=seed), some_absent(seed, num_present=num_present)
    liars = rng.permutation(np.flatnonzero(weights))[:num_liars]
    honest = np.setdiff1d(np.flatnonzero(weights), liars)
    messages[liars] = lies_of(plot, np.asarray(lies, np.float32).reshape(4, 5)[:num_liars], messages[honest])
    low, high = messages[honest].min(axis=0), messages[honest].max(axis=0)
    found = by_all(messages, weights)
    for name in ("trimmed_mean", "median"):
        assert np.all((low <= found[name] + 1e-6) & (found[name] <= high + 1e-6)), name
    honest_mean = messages[honest].mean(axis=0)
    spread = np.linalg.norm(messages[honest] - honest_mean, axis=1).max()
    share, neighbours = num_liars / num_present, num_present - 6
    radius = {  # both follow from the definitions, in docs/robust_aggregation.md
        "geometric_median": 2 * (1 - share) / (1 - 2 * share),
        "krum": 1 + 2 * np.sqrt(neighbours / (neighbours - num_liars + 1)),
    }
    radius["multi_krum"] = radius["krum"]
    for name, times in radius.items():
        assert np.linalg.norm(found[name] - honest_mean) <= times * spread * 1.001, name


@settings(max_examples=100, deadline=None)
@given(
    PLOTS,
    st.lists(LIES, min_size=75, max_size=75),
    st.integers(0, 2**32 - 1),
    st.integers(1, SLOTS - 1),
    st.sampled_from([0.01, 0.2, 0.4, 0.45]),
)
def test_the_geometric_median_stays_with_the_weight_however_many_liars_there_are(plot, lies, seed, num_liars, share):
    rng = np.random.default_rng(seed)
    messages, weights = normal(SLOTS, 5, seed=seed), rng.uniform(1, 9, SLOTS)
    liars, honest = np.split(rng.permutation(SLOTS), [num_liars])
    weights[liars] *= share / (1 - share) * weights[honest].sum() / weights[liars].sum()
    messages[liars] = lies_of(plot, np.asarray(lies, np.float32).reshape(15, 5)[:num_liars], messages[honest])
    honest_mean = np.average(messages[honest], axis=0, weights=weights[honest])
    spread = np.linalg.norm(messages[honest] - honest_mean, axis=1).max()
    moved = np.linalg.norm(by_all(messages, weights)["geometric_median"] - honest_mean)
    assert moved <= 2 * (1 - share) / (1 - 2 * share) * spread * 1.001 + 1e-5


@pytest.mark.parametrize("lie", [10.0, 1e3, 1e20])
@pytest.mark.parametrize("honest_weight", [2, 100])  # of 3 clients, beside 4 that weigh 1
def test_many_liars_at_one_point_do_not_hold_the_geometric_median(lie, honest_weight):
    messages = normal(7, 5)
    messages[3:] = lie
    weights = np.repeat([honest_weight, 1], [3, 4])
    share = 4 / weights.sum()
    honest_mean = messages[:3].mean(axis=0)
    spread = np.linalg.norm(messages[:3] - honest_mean, axis=1).max()
    moved = np.linalg.norm(by_all(messages, weights)["geometric_median"] - honest_mean)
    assert moved <= 2 * (1 - share) / (1 - 2 * share) * spread


def test_one_liar_takes_the_mean_wherever_it_likes():
    messages = normal(SLOTS, 5)
    messages[3] = 1e6
    assert np.all(by_all(messages)["mean"] > 1e4)


def test_bf16_messages_are_aggregated_in_float32():
    messages = jnp.asarray(1 + normal(SLOTS, SIZE) / 100, jnp.bfloat16)
    found, exact = by_all(messages), by_all(np.asarray(messages, np.float32))
    for name in RULES:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], exact[name])


def test_clipping_shortens_what_is_too_long_and_leaves_the_rest():
    message = {"a": normal(40), "b": normal(7, 3)}
    flat = np.concatenate([message["a"], message["b"].reshape(-1)]).astype(np.float64)
    length = np.linalg.norm(flat)
    for norm in (0.3, length * 0.999):
        clipped = shortened(message, norm)
        found = np.concatenate([clipped["a"], clipped["b"].reshape(-1)])
        np.testing.assert_allclose(found, flat * norm / length, rtol=3e-4)
    jax.tree.map(np.testing.assert_array_equal, shortened(message, length * 1.001), message)


def test_centred_clipping_goes_the_stated_way_from_the_centre():
    message, centre = normal(30), normal(30, seed=1)
    apart = message - centre
    np.testing.assert_allclose(shortened(message, 2.0, centre), centre + 2 * apart / np.linalg.norm(apart), atol=3e-4)
    for hostile in (np.nan, np.inf, 3e38):
        np.testing.assert_array_equal(shortened(np.full(30, hostile, np.float32), 2.0, centre), centre)


def test_a_clipped_mean_is_moved_by_a_liar_no_further_than_its_share_of_the_norm():
    messages = normal(SLOTS, 50) / 100
    lying = messages.copy()
    lying[0] = 1e12
    clipped = {
        key: jax.jit(jax.vmap(lambda m: clip(m, 0.5)))(of) for key, of in {"honest": messages, "lying": lying}.items()
    }
    moved = np.linalg.norm(by_all(clipped["lying"])["mean"] - by_all(clipped["honest"])["mean"])
    assert moved <= (0.5 + 0.5) / SLOTS


@pytest.mark.parametrize(
    ("block", "factor"),
    [
        (options.SignFlip(fraction=0.2), -1),
        (options.SignFlip(fraction=0.2, scale=3.0), -3),
        (options.Scaled(fraction=0.2, scale=10.0), 10),
        (options.LabelFlip(fraction=0.2), 1),
    ],
)
def test_attacks_multiply_the_messages_of_the_malicious_alone(block, factor):
    message = {"a": normal(5), "b": jnp.asarray(normal(3), jnp.bfloat16)}
    attack, key = attack_of(block), jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, attack(message, key, jnp.asarray(False)), message)
    sent = attack(message, key, jnp.asarray(True))
    assert sent["b"].dtype == jnp.bfloat16
    jax.tree.map(lambda s, m: np.testing.assert_allclose(s, factor * m, rtol=1e-2), sent, message)


def test_gaussian_noise_is_as_long_as_asked_and_knows_nothing_of_the_message():
    message = {"a": 0.01 * normal(150, 200) + 0.02, "b": normal(1000, seed=1)}
    assert attack_of(options.Gaussian(fraction=0.2, scale=5.0)) == Gaussian(5.0)
    attack = jax.jit(Gaussian(5.0))
    sent = attack(message, jax.random.key(1), jnp.asarray(True))
    flat, noise = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (message, sent))
    assert scipy.stats.kstest(noise, scipy.stats.norm(0, 5 * np.sqrt(np.mean(flat**2))).cdf).pvalue > 0.01
    assert abs(np.corrcoef(flat, noise)[0, 1]) < 0.02
    jax.tree.map(np.testing.assert_array_equal, attack(message, jax.random.key(1), jnp.asarray(False)), message)


def test_flipped_labels_are_counted_from_the_other_end():
    labels = np.asarray([0, 3, 9])
    np.testing.assert_array_equal(flip_labels(labels, 10, jnp.asarray(True)), [9, 6, 0])
    np.testing.assert_array_equal(flip_labels(labels, 10, jnp.asarray(False)), labels)


def test_malicious_clients_are_as_many_as_asked_any_of_them_and_always_the_same():
    drawn = np.stack([malicious_clients(20, 4, seed) for seed in range(500)])
    assert np.all(drawn.sum(axis=1) == 4)
    np.testing.assert_array_equal(drawn[7], malicious_clients(20, 4, 7))
    assert scipy.stats.chisquare(drawn.sum(axis=0)).pvalue > 0.01


def test_blocks_name_every_rule():
    adapter = TypeAdapter(options.Aggregator)
    arguments = {"trimmed_mean": {"fraction": 0.3}, "krum": {"byzantine": 4}, "multi_krum": {"byzantine": 4}}
    arguments["geometric_median"] = {"iterations": 32}
    for name, rule in RULES.items():
        assert rule_of(adapter.validate_python({"kind": name, **arguments.get(name, {})})) == rule
    assert attack_of(options.Scaled(fraction=0.1, scale=4.0)) == Scaled(4.0)


@pytest.mark.parametrize(
    ("aggregator", "arguments", "says"),
    [
        (options.Median(), {"weighting": "samples"}, "median counts clients, not their samples"),
        (options.Krum(byzantine=4), {}, "krum needs 2 x 4 + 3 = 11 messages, and the cohort has 10; use at most 3"),
        (options.Krum(byzantine=0), {"cohort_size": 2}, "use a larger cohort"),
        (options.MultiKrum(byzantine=2, selected=9), {}, "9 of 10 messages would let in some of the 2"),
        (options.TrimmedMean(fraction=0.05), {}, "0.05 of 10 messages is less than one"),
        (options.TrimmedMean(fraction=0.4), {"cohort_size": 2}, "it needs 3, or use mean"),
        (options.GeometricMedian(), {"cohort_size": 2}, "tolerates none"),
    ],
)
def test_what_a_cohort_is_too_small_for_is_said(aggregator, arguments, says):
    problems = options.aggregator_problems(aggregator, **{"weighting": "equal", "cohort_size": 10, **arguments})
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize("algorithm", ["fednova", "q_fedavg"])
def test_lengths_of_messages_that_are_no_plain_changes_are_not_gone_by(algorithm):
    for block in (options.Krum(byzantine=1), options.MultiKrum(byzantine=1), options.GeometricMedian()):
        (problem,) = options.length_problems(block, algorithm)
        assert "distances between messages" in problem
        assert not options.length_problems(block, "fedavg")
    (problem,) = options.length_problems(options.Median(clip_norm=1.0), algorithm)
    assert "clip_norm: goes by the length" in problem
    assert not options.length_problems(options.TrimmedMean(fraction=0.1), algorithm)


def test_rules_that_fit_are_taken():
    for block in (options.Krum(byzantine=3), options.MultiKrum(byzantine=3), options.TrimmedMean(fraction=0.1)):
        assert not options.aggregator_problems(block, weighting="equal", cohort_size=10)
    for block in (options.Mean(), options.GeometricMedian()):
        assert not options.aggregator_problems(block, weighting="samples", cohort_size=10)


def test_options_out_of_range_are_refused():
    for kind, wrong in (("trimmed_mean", {"fraction": 0.5}), ("mean", {"clip_around": "last"}), ("krum", {})):
        with pytest.raises(ValidationError):
            TypeAdapter(options.Aggregator).validate_python({"kind": kind, **wrong})
    assert "is none of them" in options.attack_problems(options.SignFlip(fraction=0.2), num_clients=2)[0]
    assert not options.attack_problems(options.SignFlip(fraction=0.2), num_clients=10)
