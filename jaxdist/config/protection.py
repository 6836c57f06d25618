"""Where `privacy:` and `secure_aggregation:` do not go with the rest of a federated run."""

from typing import Any

from jaxdist.config.base import kind_or_target
from jaxdist.config.compression import NoCompression
from jaxdist.config.privacy import CentralPrivacy, SamplingKind, privacy_conflicts, secure_aggregation_conflicts

RELEASED = {"scaffold": "scaffold's control variates", "fednova": "fednova's numbers of steps"}


def protection_problems(config: Any) -> list[str]:
    """All of them, a line each, with where they are."""
    strategy = config.strategy
    problems = []
    if strategy.privacy is not None:
        problems += [f"strategy.privacy: {problem}" for problem in _privacy_problems(config)]
    if strategy.secure_aggregation is not None:
        problems += [f"strategy.secure_aggregation: {problem}" for problem in _secure_problems(config)]
    return problems


def _privacy_problems(config: Any) -> list[str]:
    strategy, privacy = config.strategy, config.strategy.privacy
    central = isinstance(privacy, CentralPrivacy)
    kind, availability = getattr(strategy.algorithm, "kind", None), strategy.availability
    timed = availability is not None and (availability.over_selection > 1 or availability.deadline is not None)
    problems = privacy_conflicts(
        privacy,
        num_clients=_num_clients(config) or 2,  # the least that any delta could be too large for
        sampling=_sampling(config),
        weighted_mean=strategy.weighting == "samples",
        aggregator=strategy.aggregator.kind,
        released_client_state=RELEASED.get(kind or ""),
        asynchronous=strategy.asynchronous is not None,
        drops_late_clients=timed,
        server_sees_client_metrics=kind == "q_fedavg",
    )
    if central and strategy.aggregator.clip_norm is not None:
        problems.append(
            "aggregator.clip_norm: clients are clipped already, and what the server clips around something else may "
            "be longer; leave it out"
        )
    budget = config.train.budget
    if central and privacy.target_epsilon is not None and not (budget.rounds or budget.steps):
        problems.append(
            "target_epsilon: noise is calibrated to a number of rounds, which train.budget does not say; give "
            "train.budget.rounds, or noise_multiplier with stop_at_epsilon"
        )
    return problems


def _secure_problems(config: Any) -> list[str]:
    strategy, compression = config.strategy, config.gradient_compression
    cohort = strategy.clients_per_round or _num_clients(config)
    kinds = [kind_or_target(c) for c in (compression.up,) if not isinstance(c, NoCompression)]
    problems = secure_aggregation_conflicts(
        strategy.secure_aggregation,
        num_clients=cohort or 2**31,  # where it is not known yet: as many as are never too few
        weighted_mean=strategy.weighting == "samples",
        aggregator=strategy.aggregator.kind,
        privacy=strategy.privacy,
        codec=(kinds[0] if kinds else "policy") if compression.codecs else None,
        asynchronous=strategy.asynchronous is not None,
    )
    if strategy.aggregator.clip_norm is not None:
        problems.append(
            "aggregator.clip_norm: the server clips single messages, which secure aggregation hides; leave it out "
            "(privacy.clip is the client's own)"
        )
    if strategy.sampling == "weighted":
        problems.append(
            "sampling: weighted counts a client twice that is drawn twice, and its weight would be known; use uniform"
        )
    return problems


def _num_clients(config: Any) -> int | None:
    """Where the config says it."""
    clients: int | None = getattr(getattr(config.data, "partition", None), "clients", None)
    return clients


def _sampling(config: Any) -> SamplingKind:
    strategy = config.strategy
    if strategy.clients_per_round in (None, _num_clients(config)) and strategy.sampling == "uniform":
        return "all"
    sampling: SamplingKind = strategy.sampling
    return sampling
