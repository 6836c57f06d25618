"""Who gets which samples: every kind of labels and sizes, and what repairs them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy import stats
from scipy.spatial.distance import jensenshannon

from jaxdist.config.errors import UserError
from jaxdist.config.partition import Partition as Block
from jaxdist.data.arrays import Arrays
from jaxdist.data.partition import fitting, labels, repair
from jaxdist.data.partition.build import build_partition
from jaxdist.data.partition.describe import describe, gini_coefficient, label_counts, label_skew

LABELS = [
    {"kind": "iid"},
    {"kind": "stratified"},
    {"kind": "dirichlet", "alpha": 0.3},
    {"kind": "labels_per_client", "labels": 2},
    {"kind": "shards", "per_client": 2},
]
SIZES = [None, {"kind": "equal"}, {"kind": "log_normal", "sigma": 1.0}, {"kind": "power_law", "exponent": 1.0}]


def labelled(num_samples, num_labels, seed=0):
    y = np.random.default_rng(seed).integers(num_labels, size=num_samples).astype(np.int32)
    return Arrays({"x": np.zeros((num_samples, 1), np.float32), "y": y}, classes=num_labels)


def divided(source, seed=0, **block):
    partition = build_partition(Block(**block), source, np.arange(len(source)), seed)
    return partition, label_counts(partition, source.fields["y"][partition.ids])


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: s["kind"] if s else "open")
@pytest.mark.parametrize("label", LABELS, ids=lambda s: s["kind"])
def test_every_sample_has_one_client_and_the_seed_says_which(label, sizes):
    source = labelled(2000, 10)
    ids = np.random.default_rng(5).permutation(2000)[:1800]  # those for training
    block = Block(clients=20, labels=label, sizes=sizes, min_samples=5)
    first, same, other = (build_partition(block, source, ids, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.sort(first.ids), np.sort(ids))
    assert first.sizes.min() >= 5
    for c in range(20):
        assert (np.diff(first.of(c)) > 0).all()
    np.testing.assert_array_equal(first.ids, same.ids)
    np.testing.assert_array_equal(first.offsets, same.offsets)
    assert (first.ids != other.ids).any()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_partition_ends_and_every_client_has_the_minimum_or_it_is_refused(data):
    num_labels, num_clients = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    minimum, num_samples = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 400))
    label = data.draw(
        st.one_of(
            st.sampled_from([{"kind": "iid"}, {"kind": "stratified"}]),
            st.builds(lambda a: {"kind": "dirichlet", "alpha": a}, st.floats(1e-6, 1e6)),
            st.builds(lambda n: {"kind": "labels_per_client", "labels": n}, st.integers(1, 4)),
            st.builds(lambda n: {"kind": "shards", "per_client": n}, st.integers(1, 4)),
        )
    )
    sizes = data.draw(
        st.one_of(
            st.sampled_from([None, {"kind": "equal"}]),
            st.builds(lambda s: {"kind": "log_normal", "sigma": s}, st.floats(0.01, 50.0)),
            st.builds(lambda e: {"kind": "power_law", "exponent": e}, st.floats(0.01, 50.0)),
        )
    )
    source = labelled(num_samples, num_labels, data.draw(st.integers(0, 3)))
    try:
        partition, _ = divided(
            source,
            data.draw(st.integers(0, 2**40)),
            clients=num_clients,
            labels=label,
            sizes=sizes,
            min_samples=minimum,
        )
    except UserError:
        need = num_clients * max(minimum, label.get("per_client", 1))
        present = len(np.unique(source.fields["y"]))
        assert num_samples < need or (
            label["kind"] == "labels_per_client" and (label["labels"] > present or num_clients < present)
        )
        return
    assert partition.num_clients == num_clients
    assert partition.sizes.min() >= minimum
    assert len(np.unique(partition.ids)) == len(partition.ids)
    owners_may_be_few = label["kind"] == "labels_per_client" and num_clients < num_labels
    assert len(partition.ids) == num_samples or owners_may_be_few


def test_iid_labels_do_not_depend_on_the_client():
    _, counts = divided(labelled(20_000, 10), clients=50)
    degrees = 49 * 9
    assert (
        stats.chi2.ppf(1e-4, degrees) < stats.chi2_contingency(counts).statistic < stats.chi2.ppf(1 - 1e-4, degrees)
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.lists(st.integers(1, 80), min_size=1, max_size=6))
def test_stratified_clients_have_their_share_of_every_label(sizes, stock):
    total = min(sum(sizes), sum(stock))
    sizes = fitting.apportion(np.array([sizes], float), np.array([total]))[0]
    stock = fitting.apportion(np.array([stock], float), np.array([total]))[0]
    counts = labels.stratified(sizes, stock, np.random.default_rng(0))
    np.testing.assert_array_equal(counts.sum(axis=1), sizes)
    np.testing.assert_array_equal(counts.sum(axis=0), stock)
    assert np.abs(counts - np.outer(sizes, stock) / total).max() <= 1


@pytest.mark.parametrize("alpha", [0.05, 0.5, 100.0])
def test_dirichlet_without_sizes_is_the_formula_of_niid_bench(alpha):
    stock, num_clients = np.array([500, 20, 333, 1, 700]), 7
    drawn = labels.log_dirichlet(np.full(num_clients, alpha), len(stock), np.random.default_rng(0))
    counts = labels.dirichlet_by_label(drawn, stock)
    held = [[] for _ in range(num_clients)]
    for label, count in enumerate(stock):
        proportions = np.exp(drawn[label]) / np.exp(drawn[label]).sum()
        proportions = np.array(
            [p * (len(h) < stock.sum() / num_clients) for p, h in zip(proportions, held, strict=True)]
        )
        proportions = proportions / proportions.sum()
        cuts = (np.cumsum(proportions) * count).astype(int)[:-1]
        for h, part in zip(held, np.split(np.full(count, label), cuts), strict=True):
            h.extend(part.tolist())
    np.testing.assert_array_equal(counts, [np.bincount(h, minlength=len(stock)) for h in held])


def test_dirichlet_draws_are_dirichlet_and_the_smallest_alpha_underflows_nothing():
    random = np.random.default_rng(0)
    logs = labels.log_dirichlet(np.full(5, 0.3), 4000, random)
    share = np.exp(logs[:, 2] - np.logaddexp.reduce(logs, axis=1))
    assert stats.kstest(share, stats.beta(0.3, 4 * 0.3).cdf).pvalue > 1e-4
    assert np.isfinite(labels.log_dirichlet(np.full(100, 1e-6), 100, random)).all()


@pytest.mark.parametrize("sizes", [None, {"kind": "log_normal", "sigma": 0.8}])
def test_a_large_alpha_gives_every_client_the_labels_of_all(sizes):
    partition, counts = divided(
        labelled(20_000, 10), clients=10, labels={"kind": "dirichlet", "alpha": 1e6}, sizes=sizes
    )
    assert label_skew(counts).total_variation_max < 0.02
    if sizes is None:
        assert np.ptp(partition.sizes) < 0.02 * 2000


def test_a_small_alpha_gives_each_label_to_one_client_or_each_client_one_label():
    source = labelled(20_000, 10)
    _, by_label = divided(source, clients=50, labels={"kind": "dirichlet", "alpha": 1e-4})
    assert (by_label.max(axis=0) > 0.99 * by_label.sum(axis=0)).all()  # the rest is what repair took
    _, by_client = divided(source, clients=1000, labels={"kind": "dirichlet", "alpha": 1e-4}, sizes={"kind": "equal"})
    assert by_client.max(axis=1).sum() > 0.95 * 20_000  # the rest wanted more of a label than there is


def test_dirichlet_inside_sizes_has_the_variance_of_the_distribution():
    alpha, num_labels = 0.5, 10
    source = labelled(400_000, num_labels)
    partition, counts = divided(
        source, clients=1000, labels={"kind": "dirichlet", "alpha": alpha}, sizes={"kind": "equal"}
    )
    assert (partition.sizes == 400).all()
    shares = counts / 400
    expected = (1 / num_labels) * (1 - 1 / num_labels) / (alpha * num_labels + 1)
    np.testing.assert_allclose(shares.var(axis=0).mean(), expected, rtol=0.1)


@pytest.mark.filterwarnings("error")
def test_labels_that_nobody_drew_are_given_out_all_the_same():
    """Shares below the smallest normal float, whose reciprocal is infinite, and below the smallest of all."""
    logs = np.array([[0.0, -715.0, -1e9], [0.0, -716.0, -1e9]])
    counts = labels.dirichlet_by_client(logs, np.array([50, 70]), np.array([60, 40, 20]), np.random.default_rng(0))
    assert counts.sum(axis=1).tolist() == [50, 70]
    assert counts.sum(axis=0).tolist() == [60, 40, 20]


def test_labels_per_client_are_that_many_and_shared_equally():
    source = labelled(6000, 10)
    _, counts = divided(source, clients=20, labels={"kind": "labels_per_client", "labels": 3})
    assert ((counts > 0).sum(axis=1) == 3).all()
    for label in range(10):
        owned = counts[counts[:, label] > 0, label]
        assert np.ptp(owned) <= 1
    assert counts.sum() == 6000


def test_labels_per_client_hold_with_sizes_which_come_as_near_as_they_can():
    source = labelled(60_000, 10)
    power = {"kind": "power_law", "exponent": 0.5}
    equal, counts_equal = divided(source, clients=200, labels={"kind": "labels_per_client", "labels": 3})
    skewed, counts = divided(source, clients=200, labels={"kind": "labels_per_client", "labels": 3}, sizes=power)
    assert ((counts > 0).sum(axis=1) == 3).all()
    np.testing.assert_array_equal(counts > 0, counts_equal > 0)  # sizes are drawn apart from labels
    law = np.arange(1, 201) ** -0.5
    np.testing.assert_allclose(np.sort(skewed.sizes)[::-1], 60_000 * law / law.sum(), rtol=0.05, atol=5)
    assert gini_coefficient(equal.sizes) < 0.1


def test_sizes_far_apart_leave_every_client_all_its_labels():
    power = {"kind": "power_law", "exponent": 4.0}
    _, counts = divided(
        labelled(6000, 10), clients=20, labels={"kind": "labels_per_client", "labels": 3}, sizes=power
    )
    assert ((counts > 0).sum(axis=1) == 3).all()


def test_sizes_are_the_same_whatever_the_labels():
    sizes = {"kind": "log_normal", "sigma": 1.0}
    found = [divided(labelled(2000, 10), clients=20, labels=label, sizes=sizes)[0].sizes for label in LABELS]
    for label, other in zip(LABELS, found, strict=True):
        if label["kind"] != "labels_per_client":
            np.testing.assert_array_equal(other, found[0])


def test_labels_of_nobody_are_left_out():
    source = labelled(1000, 10)
    partition, counts = divided(source, clients=2, labels={"kind": "labels_per_client", "labels": 2})
    assert ((counts > 0).sum(axis=1) == 2).all()
    owned = np.isin(source.fields["y"], np.flatnonzero(counts.sum(axis=0)))
    np.testing.assert_array_equal(np.sort(partition.ids), np.flatnonzero(owned))


def test_shards_are_runs_of_the_samples_sorted_by_label():
    y = np.repeat(np.arange(10), 100).astype(np.int32)
    source = Arrays({"x": np.zeros((1000, 1), np.float32), "y": y}, classes=10)
    partition, counts = divided(source, clients=50, labels={"kind": "shards", "per_client": 2})
    assert (partition.sizes == 20).all()
    assert set(np.unique(counts)) == {0, 10, 20}  # ten samples of one label each
    assert (counts.sum(axis=0) == 100).all()


def test_power_law_sizes_fall_with_the_rank():
    partition, _ = divided(labelled(50_000, 2), clients=100, sizes={"kind": "power_law", "exponent": 1.3})
    law = np.arange(1, 101) ** -1.3
    assert np.abs(np.sort(partition.sizes)[::-1] - 50_000 * law / law.sum()).max() < 1
    assert (np.diff(partition.sizes) > 0).any()  # ranks are dealt at random


def test_log_normal_sizes_are_log_normal():
    partition, _ = divided(labelled(300_000, 2), clients=1000, sizes={"kind": "log_normal", "sigma": 0.5})
    logarithms = np.log(partition.sizes)
    assert stats.kstest((logarithms - logarithms.mean()) / 0.5, "norm").pvalue > 1e-4


@settings(deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.floats(0, 1e6)),
    st.integers(0, 1000),
)
def test_apportion_is_exact_in_sum_and_less_than_one_from_each_share(shares, total):
    shares[:, 0] += 1.0
    totals = np.arange(len(shares)) + total
    whole = fitting.apportion(shares, totals)
    np.testing.assert_array_equal(whole.sum(axis=1), totals)
    assert (whole[shares == 0] == 0).all()
    assert np.abs(whole - shares / shares.sum(axis=1, keepdims=True) * totals[:, None]).max() < 1 + 1e-6


def test_proportional_fit_meets_both_sums_and_keeps_the_odds_ratios():
    random = np.random.default_rng(0)
    weights = random.random((6, 4)) + 0.1
    sizes, stock = np.array([10, 20, 30, 40, 50, 50.0]), np.array([20, 30, 50, 100.0])
    fitted = fitting.proportional_fit(weights, sizes, stock)
    np.testing.assert_allclose(fitted.sum(axis=0), stock)
    np.testing.assert_allclose(fitted.sum(axis=1), sizes, atol=0.5)

    def odds(m):
        return m[1:, 1:] * m[0, 0] / (m[1:, :1] * m[:1, 1:])

    np.testing.assert_allclose(odds(fitted), odds(weights))


def test_swapped_surplus_keeps_clients_sizes_and_meets_the_stock():
    random = np.random.default_rng(0)
    counts = random.integers(0, 20, (30, 5))
    stock = random.permutation(counts.sum(axis=0))
    swapped = fitting.swap_surplus(counts, stock, random)
    np.testing.assert_array_equal(swapped.sum(axis=0), stock)
    np.testing.assert_array_equal(swapped.sum(axis=1), counts.sum(axis=1))
    assert swapped.min() >= 0
    assert np.abs(swapped - counts).sum() == 2 * (counts.sum(axis=0) - stock).clip(0).sum()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=10), st.data())
def test_shaving_takes_from_the_largest_one_at_a_time(clients, data):
    sizes = np.array([max(c) for c in clients])
    available = np.array([min(c) for c in clients])
    amount = data.draw(st.integers(0, int(available.sum())))
    taken = repair.shave(sizes, available, amount)
    left = sizes.copy()
    for _ in range(amount):
        gives = np.flatnonzero(sizes - left < available)
        left[gives[np.argmax(left[gives])]] -= 1
    assert taken.sum() == amount
    assert ((taken >= 0) & (taken <= available)).all()
    np.testing.assert_array_equal(np.sort(sizes - taken), np.sort(left))


def test_repair_moves_no_more_than_is_missing_and_prefers_the_labels_a_client_has():
    counts = np.array([[50, 50, 0], [0, 30, 30], [2, 0, 0], [0, 0, 3]])
    preferred = (counts > 0).astype(float)
    repaired = repair.repair(counts, 10, preferred)
    np.testing.assert_array_equal(repaired.sum(axis=0), counts.sum(axis=0))
    np.testing.assert_array_equal(repaired, [[42, 50, 0], [0, 30, 23], [10, 0, 0], [0, 0, 10]])
    np.testing.assert_array_equal(repair.repair(counts, 2, preferred), counts)
    all_equal = repair.repair(counts, 165 // 4, preferred)  # labels a client did not have, where it cannot be else
    assert all_equal.sum(axis=1).min() >= 165 // 4


def test_numbers_of_skew_are_those_of_scipy_and_of_the_definitions():
    counts = np.random.default_rng(0).integers(0, 50, (8, 6)) * (np.random.default_rng(1).random((8, 6)) < 0.6)
    counts[3] = 0  # a client without samples counts for nothing
    skew, p = label_skew(counts), counts.sum(axis=0) / counts.sum()
    held = counts[counts.sum(axis=1) > 0]
    distances = [jensenshannon(row, p, base=2) for row in held]
    variations = [max(abs((row / row.sum() - p)[list(s)].sum()) for s in subsets(6)) for row in held]
    effective = [np.exp(stats.entropy(row)) for row in held]
    np.testing.assert_allclose(
        [skew.jensen_shannon_mean, skew.jensen_shannon_max], [np.mean(distances), max(distances)]
    )
    np.testing.assert_allclose(
        [skew.total_variation_mean, skew.total_variation_max], [np.mean(variations), max(variations)]
    )
    np.testing.assert_allclose(
        [skew.effective_classes_mean, skew.effective_classes_min], [np.mean(effective), min(effective)]
    )


def subsets(n):
    """Total variation is the largest difference of the probabilities of any event."""
    return [[i for i in range(n) if mask >> i & 1] for mask in range(1, 2**n)]


def test_gini_is_half_the_relative_mean_difference_of_sizes():
    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    by_pairs = np.abs(sizes[:, None] - sizes).mean() / (2 * sizes.mean())
    assert gini_coefficient(sizes) == pytest.approx(by_pairs)
    assert gini_coefficient(np.full(5, 7)) == 0


def test_description_of_two_clients_by_hand():
    source = Arrays({"x": np.zeros((4, 1)), "y": np.array([0, 0, 1, 1], np.int32)}, classes=2)
    partition, counts = divided(source, clients=2, labels={"kind": "labels_per_client", "labels": 1})
    found = describe(partition, source.fields["y"][partition.ids])
    assert sorted(counts.tolist()) == [[0, 2], [2, 0]]
    assert (found.size_min, found.size_median, found.size_max, found.gini) == (2, 2, 2, 0)
    assert found.labels.total_variation_max == 0.5
    assert found.labels.effective_classes_min == 1.0
    assert found.labels.jensen_shannon_max == pytest.approx(np.sqrt(1.5 - 0.75 * np.log2(3)))
    assert describe(partition, None).labels is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"clients": 300}, "300 clients of at least 1 samples need 300, and 200"),
        ({"clients": 30, "min_samples": 7}, "lower clients or min_samples"),
        ({"clients": 3, "labels": {"kind": "labels_per_client", "labels": 5}}, "more than the 4"),
        ({"clients": 90, "labels": {"kind": "shards", "per_client": 3}}, "lower per_client"),
        (
            {"clients": 2, "labels": {"kind": "labels_per_client", "labels": 1}, "min_samples": 90},
            "give clients more labels",
        ),
        ({"natural": "user"}, "names no clients: the data have the integer fields y"),
        ({"natural": "y", "min_samples": 190}, "no value of y has 190 samples"),
    ],
)
def test_what_cannot_be_divided_is_refused_before(block, message):
    with pytest.raises(UserError, match=message):
        divided(labelled(200, 4), **block)


def test_labels_of_data_without_labels_are_refused_and_their_sizes_are_not():
    tokens = Arrays({"tokens": np.zeros((100, 9), np.uint8)}, vocabulary=256)
    with pytest.raises(UserError, match="the data have tokens, which have no labels"):
        build_partition(Block(clients=4, labels={"kind": "shards"}), tokens, np.arange(100), 0)
    block = Block(clients=4, sizes={"kind": "power_law", "exponent": 1.0})
    assert build_partition(block, tokens, np.arange(100), 0).sizes.sum() == 100


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "give one of clients, natural and manifest; given: none"),
        ({"clients": 3, "natural": "user"}, "given: clients, natural"),
        ({"natural": "user", "sizes": {"kind": "equal"}}, "sizes has no effect with natural"),
        ({"manifest": "a.json", "min_samples": 3}, "min_samples has no effect with manifest"),
        ({"clients": 3, "labels": {"kind": "dirichlet", "alpha": 0.0}}, "greater than or equal to"),
        ({"clients": 3, "labels": {"kind": "iid", "alpha": 1.0}}, "Extra inputs"),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(block, message):
    with pytest.raises(ValidationError, match=message):
        Block(**block)
