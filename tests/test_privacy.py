"""Differential privacy: clips hold, noise has the scale that is accounted for, what is spent is dp-accounting's."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import define_prng_impl
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import LEAST_NOISE, AdaptiveClipping, CentralPrivacy, LocalPrivacy
from jaxdist.federated.privacy.accountant import Accountant, FixedSize, Poisson, calibrate, default_delta
from jaxdist.federated.privacy.build import build_central, build_local, delta_in_force
from jaxdist.federated.privacy.central import AdaptiveClip, Central, Contribution
from jaxdist.federated.privacy.clip import clip
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.privacy.noise import noise, secret_key

NUM_CLIENTS, COHORT = 3400, 50
PUBLISHED = Poisson(COHORT / NUM_CLIENTS)
DELTA = NUM_CLIENTS**-1.1


def norm64(update) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(update))))


# Clipping.


@settings(deadline=None, max_examples=30)
@given(
    scale=st.floats(1e-6, 1e6),
    bound=st.floats(1e-3, 1e3),
    size=st.sampled_from([1, 7, 100_000]),
    seed=st.integers(0, 9),
)
def test_a_clipped_update_is_never_above_the_norm_and_a_small_one_is_untouched(scale, bound, size, seed):
    draw = np.random.default_rng(seed)
    update = {"a": (scale * draw.normal(size=size)).astype(np.float32), "b": np.full((2, 3), scale, np.float32)}
    clipped = clip(update, bound)
    assert norm64(clipped.update) <= bound
    assert float(clipped.norm) == pytest.approx(norm64(update), rel=1e-4)
    if norm64(update) < 0.999 * bound:
        jax.tree.map(np.testing.assert_array_equal, clipped.update, update)
    if norm64(update) > bound:
        assert clipped.was_clipped
        assert norm64(clipped.update) > 0.999 * bound  # and no more is taken than must be


def test_the_norm_is_over_all_leaves_together():
    clipped = clip({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}, 1.0)
    assert clipped.norm == 5
    np.testing.assert_allclose(clipped.update["b"] / clipped.update["a"][0], 4 / 3, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_an_update_that_is_not_finite_counts_as_zeros(bad):
    clipped = clip({"a": jnp.array([1.0, bad]), "b": jnp.ones(3)}, 1.0)
    assert norm64(clipped.update) == 0
    assert clipped.was_clipped


# Noise.


def test_the_noise_of_the_sum_has_the_stated_scale_whatever_the_cohort():
    """Chi-square on (mean * cohort - sum): noise added at each client, or divided twice, would be far outside."""
    size, z, bound = 20_000, 1.3, 0.7
    for clients in (1, 40):
        central = Central(z, expected_cohort=40.0, start=bound)
        total = Contribution(jnp.full(size, 2.0 * clients), jnp.float32(0))
        mean, _ = central.server(total, central.init(), jax.random.key(5))
        of_sum = np.asarray(mean, np.float64) * 40 - 2.0 * clients
        statistic = np.sum(of_sum**2) / (z * bound) ** 2
        low, high = stats.chi2.interval(0.9999, size)
        assert low < statistic < high
        assert stats.kstest(of_sum / (z * bound), "norm").pvalue > 1e-4


def test_the_mean_is_over_the_expected_cohort_not_over_who_came():
    central = Central(1e-9, expected_cohort=10.0, start=1.0)
    total = Contribution(jnp.full(4, 7.0), jnp.float32(0))
    np.testing.assert_allclose(central.server(total, central.init(), jax.random.key(0))[0], 0.7, rtol=1e-6)


def test_noise_is_the_same_bits_on_1_2_and_8_devices():
    like = {"a": jnp.zeros((64, 8)), "b": jnp.zeros(16)}
    drawn = []
    for devices in (1, 2, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("clients",))
        sharded = NamedSharding(mesh, PartitionSpec("clients"))
        drawn.append(jax.jit(lambda key: noise(like, 2.0, key), out_shardings=sharded)(jax.random.key(3)))
    for other in drawn[1:]:
        jax.tree.map(np.testing.assert_array_equal, drawn[0], other)


def test_noise_differs_between_leaves_and_between_keys():
    first, second = noise([jnp.zeros(9), jnp.zeros(9)], 1.0, jax.random.key(0))
    again = noise([jnp.zeros(9)], 1.0, jax.random.key(1))[0]
    assert not np.intersect1d(first, second).size
    assert not np.intersect1d(first, again).size
    assert (jax.random.key_data(secret_key()) != jax.random.key_data(secret_key())).any()


def _ones(key, bit_width, shape):
    assert bit_width == 32
    return jnp.full(shape, 2**32 - 1, jnp.uint32)


LARGEST = define_prng_impl(  # a generator that draws the largest number every time
    key_shape=(1,),
    seed=lambda seed: jnp.zeros(1, jnp.uint32),
    split=lambda key, shape: jnp.zeros((*shape, 1), jnp.uint32),
    random_bits=_ones,
    fold_in=lambda key, data: key,
    name="largest",
)


def test_noise_goes_so_far_that_its_end_tells_no_client():
    """Beyond the largest number that can be drawn, results say for sure that a client was there: one draw in float32
    ends at 5.22, and with z = 0.5 a client then shows with a chance of 6e-4."""
    key, z = jax.random.key(0, impl=LARGEST), 0.5
    central = Central(z, 1.0, start=1.0, adaptive=AdaptiveClip(learning_rate=1.0))
    mean, clip_after = central.server(Contribution(jnp.zeros(3), jnp.float32(0)), central.init(), key)
    ends = [*noise([jnp.zeros(3)], 1.0, key), mean / central.update_noise_multiplier]
    ends += [Local(1.0, 2.0).client(jnp.zeros(3), key) / 2, -jnp.log(clip_after) / central.count_stddev]
    for end in ends:
        assert np.all(stats.norm.sf(np.asarray(end) - 1 / z) < 1e-15)


# The adaptive clip.


def test_the_adaptive_clip_converges_to_the_quantile_of_the_norms():
    cohort, quantile = 200, 0.8
    norms = stats.lognorm(s=0.5, scale=3.0)
    central = Central(1.0, cohort, start=0.1, adaptive=AdaptiveClip(quantile, learning_rate=0.2))
    directions = jnp.array([[0.6, 0.8]])

    @jax.jit
    def one_round(current, key):
        draw, served = jax.random.split(key)
        sizes = 3.0 * jnp.exp(0.5 * jax.random.normal(draw, (cohort,)))
        given = jax.vmap(central.client, in_axes=(0, None))(sizes[:, None] * directions, current)
        total = jax.tree.map(lambda leaf: leaf.sum(0), given)
        return central.server(total, current, served)[1]

    current, seen = central.init(), []
    for key in jax.random.split(jax.random.key(0), 300):
        current = one_round(current, key)
        seen.append(float(current))
    assert np.mean(seen[150:]) == pytest.approx(norms.ppf(quantile), rel=0.05)
    assert seen[0] < 0.2  # from far below


def test_the_split_of_the_noise_adds_up_to_what_is_accounted_for():
    """Two Gaussian mechanisms of multipliers a and b (in sensitivities) are one of (a^-2 + b^-2)^(-1/2)."""
    for cohort in (4.0, 100.0, 1000.0):
        central = Central(1.1, cohort, start=1.0, adaptive=AdaptiveClip())
        of_count = central.count_stddev / 0.5  # a client moves the centred count by 1/2
        together = (central.update_noise_multiplier**-2 + of_count**-2) ** -0.5
        assert together == pytest.approx(1.1)
        assert central.update_noise_multiplier <= 1.1 * 2 / 3**0.5 + 1e-9


def test_rounding_after_the_clip_makes_the_noise_grow_along():
    plain, rounded = Central(1.0, 10.0, 1.0), Central(1.0, 10.0, 1.0, rounding_norm=0.5)
    total = Contribution(jnp.zeros(8), jnp.float32(0))
    first, second = (c.server(total, c.init(), jax.random.key(0))[0] for c in (plain, rounded))
    np.testing.assert_allclose(second, 1.5 * first, rtol=1e-6)


# The accountant.


def test_the_accountant_says_what_dp_accounting_says():
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.5))
    by_rdp = rdp.RdpAccountant().compose(event, 30).get_epsilon(1e-5)
    by_pld = pld.PLDAccountant().compose(event, 30).get_epsilon(1e-5)
    assert Accountant(1.5, Poisson(0.1), "rdp").epsilon(30, 1e-5) == by_rdp
    assert Accountant(1.5, Poisson(0.1), "pld").epsilon(30, 1e-5) == pytest.approx(by_pld, rel=1e-6)


def test_the_published_figures_of_1500_rounds_come_out():
    assert Accountant(1.0, PUBLISHED, "rdp").epsilon(1500, DELTA) == pytest.approx(3.197, abs=5e-4)
    assert Accountant(1.0, PUBLISHED, "pld").epsilon(1500, DELTA) == pytest.approx(2.832, abs=5e-4)
    assert calibrate(2.0, DELTA, PUBLISHED, 1500, "rdp") == pytest.approx(1.298, abs=1.01e-3)


def test_full_participation_is_the_gaussian_mechanism_alone():
    exact = dp_accounting.get_epsilon_gaussian(4.0 / 20**0.5, 1e-5)  # 20 rounds are one with sqrt(20) less noise
    for sampling in (Poisson(1.0), FixedSize(8, 8)):
        assert Accountant(4.0, sampling, "pld").epsilon(20, 1e-5) == pytest.approx(exact, rel=1e-3)
    assert Accountant(4.0, Poisson(1.0), "rdp").epsilon(20, 1e-5) >= exact


def test_cohorts_of_a_fixed_size_get_no_poisson_bound():
    sampling = FixedSize(COHORT, NUM_CLIENTS)
    with pytest.raises(UserError, match="Poisson"):
        Accountant(1.0, sampling, "pld")
    with pytest.raises(UserError, match="Poisson"):
        calibrate(2.0, 1e-5, sampling, 10, "pld")
    accountant = Accountant(2.0, sampling, "rdp")
    assert accountant.relation == "one client replaced"
    # Replacing a client moves the sum by two clips: never cheaper than Poisson's bound with half the noise.
    assert accountant.epsilon(100, DELTA) >= Accountant(1.0, PUBLISHED, "rdp").epsilon(100, DELTA)


@pytest.mark.parametrize(
    ("kind", "sampling"), [("pld", Poisson(1.0)), ("rdp", Poisson(0.2)), ("rdp", FixedSize(10, 100))]
)
def test_calibration_spends_the_target_and_hardly_less(kind, sampling):
    found = calibrate(3.0, 1e-5, sampling, 40, kind)
    assert 2.97 < Accountant(found, sampling, kind).epsilon(40, 1e-5) <= 3.0
    assert Accountant(found - 2e-3, sampling, kind).epsilon(40, 1e-5) > 3.0


def test_the_last_round_within_a_budget_is_the_last():
    accountant = Accountant(8.0, Poisson(1.0))
    last = accountant.rounds_until(3.0, 1e-5, most=1000)
    assert accountant.epsilon(last, 1e-5) <= 3.0 < accountant.epsilon(last + 1, 1e-5)
    assert accountant.rounds_until(3.0, 1e-5, most=last - 1) == last - 1
    assert accountant.rounds_until(1e-3, 1e-5, most=1000) == 0
    assert accountant.epsilon(0, 1e-5) == 0


def test_little_noise_is_accounted_for_on_a_grid_that_memory_holds():
    """dp-accounting's own grid of 1e-4 would be 6e7 values."""
    exact = dp_accounting.get_epsilon_gaussian(LEAST_NOISE, 1e-5)
    assert exact <= Accountant(LEAST_NOISE, Poisson(1.0)).epsilon(1, 1e-5) < 1.001 * exact
    assert exact / 2 < Accountant(LEAST_NOISE, Poisson(0.5)).epsilon(1, 1e-5) < exact


def test_more_than_can_be_spent_takes_no_less_than_the_least_noise():
    assert calibrate(1e5, 1e-5, Poisson(1.0), 1) == LEAST_NOISE


def test_no_delta_in_force_lets_a_client_be_published():
    assert [default_delta(n) for n in (2, 1000)] == [1e-5, 1e-5]
    assert default_delta(10**6) == pytest.approx(10**-6.6)
    for clients in (2, 10, 10**5, 10**7):
        assert delta_in_force(None, clients) < 1 / clients
    for delta, clients in ((0.5, 2), (1e-3, 1000), (0.1, 100)):
        with pytest.raises(UserError, match=f"no less than 1 / {clients} clients"):
            build_local(LocalPrivacy(kind="local", epsilon=8.0, delta=delta), clients)
    with pytest.raises(UserError, match="at least 2"):
        build_local(LocalPrivacy(kind="local", epsilon=8.0), 1)
    with pytest.raises(UserError, match="at least 2"):
        build_central(CentralPrivacy(noise_multiplier=1.0), Poisson(1.0), num_clients=1, num_rounds=1)
    assert build_local(LocalPrivacy(kind="local", epsilon=8.0), 2)[0].epsilon(1, 1e-5) == pytest.approx(8)


# Built from the config.


def test_a_target_epsilon_becomes_noise_and_a_stop_becomes_a_last_round():
    block = CentralPrivacy(target_epsilon=4.0, accountant="rdp")
    central, budget = build_central(block, Poisson(1.0), num_clients=100, num_rounds=50)
    assert budget.epsilon(50) <= 4.0 < budget.epsilon(51)
    assert (central.expected_cohort, budget.delta, budget.last_round) == (100.0, default_delta(100), None)
    block = CentralPrivacy(
        noise_multiplier=8.0, stop_at_epsilon=3.0, clip=AdaptiveClipping(start=0.4), accountant="rdp"
    )
    central, budget = build_central(block, Poisson(1.0), num_clients=100, num_rounds=5000)
    assert budget.last_round is not None
    assert budget.epsilon(budget.last_round) <= 3.0 < budget.epsilon(budget.last_round + 1)
    assert float(central.init()) == pytest.approx(0.4)
    with pytest.raises(UserError, match="stop_at_epsilon: the first round"):
        build_central(block.model_copy(update={"noise_multiplier": 0.5}), Poisson(1.0), num_clients=100, num_rounds=9)


# At the client.


def test_local_noise_is_of_two_clips_and_less_than_the_classic_formula():
    mechanism, delta = build_local(LocalPrivacy(kind="local", clip=0.5, epsilon=0.9), num_clients=1000)
    assert mechanism.epsilon(1, delta) == pytest.approx(0.9, rel=1e-6)
    assert mechanism.stddev < 2 * 0.5 * np.sqrt(2 * np.log(1.25 / delta)) / 0.9
    sent = mechanism.client({"a": jnp.zeros(20_000)}, jax.random.key(1))["a"]
    low, high = stats.chi2.interval(0.9999, 20_000)
    assert low < np.sum(np.asarray(sent, np.float64) ** 2) / mechanism.stddev**2 < high


def test_messages_of_one_client_compose():
    mechanism = Local(1.0, stddev=10.0)
    by_rounds = Accountant(5.0, Poisson(1.0), "pld").epsilon(9, 1e-6)  # 10 in sensitivities of 2 clips
    assert mechanism.epsilon(9, 1e-6) == pytest.approx(by_rounds, rel=1e-3)
