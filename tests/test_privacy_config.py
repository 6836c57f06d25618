"""The blocks `privacy:` and `secure_aggregation:`: what is no choice, and what contradicts the rest of a run."""

import pytest
from pydantic import TypeAdapter, ValidationError

from jaxdist.config.privacy import (
    AdaptiveClipping,
    CentralPrivacy,
    LocalPrivacy,
    Privacy,
    SecureAggregation,
    privacy_conflicts,
    secure_aggregation_conflicts,
)

CENTRAL = CentralPrivacy(noise_multiplier=1.0)
LOCAL = LocalPrivacy(kind="local", epsilon=1.0)
FITS = {"num_clients": 100, "sampling": "poisson", "weighted_mean": False}


def test_the_block_reads_as_documented():
    read = TypeAdapter(Privacy).validate_python
    adaptive = read({"kind": "central", "clip": {"kind": "adaptive", "quantile": 0.9}, "target_epsilon": 2})
    assert adaptive.clip == AdaptiveClipping(quantile=0.9)
    assert read({"kind": "central", "clip": 1, "noise_multiplier": 0.5}).clip == 1.0
    assert read({"kind": "local", "epsilon": 3.0}).epsilon == 3.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_multiplier": 1.0, "target_epsilon": 1.0},
        {"target_epsilon": 1.0, "stop_at_epsilon": 1.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": 1e-6},
        {"noise_multiplier": 1.0, "delta": 1.0},
        {"noise_multiplier": 1.0, "clip": {"kind": "adaptive", "quantile": 1.0}},
    ],
)
def test_noise_is_given_once_and_makes_sense(options):
    with pytest.raises(ValidationError):
        CentralPrivacy(**options)


def test_nothing_contradicts_a_plain_private_mean():
    assert privacy_conflicts(CENTRAL, **FITS) == []
    assert privacy_conflicts(CENTRAL, **FITS, codec="int8", clips_decoded=True) == []
    assert privacy_conflicts(LOCAL, **{**FITS, "sampling": "uniform"}, asynchronous=True) == []
    by_rdp = CentralPrivacy(noise_multiplier=1.0, accountant="rdp")
    assert privacy_conflicts(by_rdp, **{**FITS, "sampling": "uniform"}) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"weighted_mean": True}, "weighted by samples"),
        ({"sampling": "uniform"}, "fixed size"),
        ({"sampling": "weighted"}, "different odds"),
        ({"released_client_state": "control variates"}, "control variates would be sent"),
        ({"aggregator": "median"}, "median is no mean"),
        ({"codec": "int8"}, "raise the norm"),
        ({"asynchronous": True}, "who is fast"),
        ({"drops_late_clients": True}, "let speed decide"),
        ({"server_sees_client_metrics": True}, "exact"),
    ],
)
def test_what_contradicts_privacy_is_said_with_its_reason(changed, reason):
    (problem,) = privacy_conflicts(CENTRAL, **{**FITS, **changed})
    assert reason in problem


def test_a_delta_at_which_one_client_may_be_published_is_refused():
    (problem,) = privacy_conflicts(CentralPrivacy(noise_multiplier=1.0, delta=0.01), **FITS)
    assert "delta: 0.01" in problem


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_clients": 2}, "at least 3"),
        ({"aggregator": "krum"}, "krum looks at single updates"),
        ({"codec": "topk"}, "cannot be added"),
        ({"asynchronous": True}, "masks could cancel"),
        ({"server_sees_client_metrics": True}, "one by one"),
        ({"server_keeps_client_state": "residuals"}, "residuals of each client"),
        ({"weighted_mean": True}, "max_weight"),
        ({"privacy": CentralPrivacy(noise_multiplier=1.0, clip=AdaptiveClipping())}, "adaptive"),
    ],
)
def test_what_contradicts_secure_aggregation_is_said_with_its_reason(changed, reason):
    fits = {"num_clients": 10, "weighted_mean": False}
    assert secure_aggregation_conflicts(SecureAggregation(), **fits) == []
    (problem,) = secure_aggregation_conflicts(SecureAggregation(), **{**fits, **changed})
    assert reason in problem


def test_options_of_secure_aggregation_without_effect_are_refused():
    (problem,) = secure_aggregation_conflicts(SecureAggregation(max_weight=9), num_clients=5, weighted_mean=False)
    assert "no effect" in problem
    (problem,) = secure_aggregation_conflicts(SecureAggregation(neighbours=5), num_clients=5, weighted_mean=False)
    assert "at most 4" in problem
    (problem,) = secure_aggregation_conflicts(SecureAggregation(neighbours=3), num_clients=10, weighted_mean=False)
    assert "3 is odd" in problem
    with pytest.raises(ValidationError, match="would choose them"):
        SecureAggregation(identities=True, neighbours=4)
    with pytest.raises(ValidationError, match="at least 2/3"):
        SecureAggregation(identities=True, threshold=0.6)
