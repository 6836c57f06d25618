"""What a run has spent: (epsilon, delta) after so many rounds of the Gaussian mechanism on a sampled cohort.

All numbers are dp-accounting's; here is only which event a round is, and what may be claimed of it.
"""

import functools
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import LEAST_NOISE

Kind = Literal["pld", "rdp"]


@dataclass(frozen=True)
class Poisson:
    """Each client comes with this probability, independently of all others. 1: everybody, always.

    The guarantee is for adding or removing one client.
    """

    probability: float


@dataclass(frozen=True)
class FixedSize:
    """A cohort of exactly so many, uniformly without replacement.

    Poisson's bound does not cover it. What does is for *replacing* one client by another (Wang, Balle and
    Kasiviswanathan 2019, arXiv 1808.00087, theorem 27), which moves the sum by two clips, not one: the accountant
    sees half the noise. By RDP alone: dp-accounting has no privacy loss distribution of it.
    """

    cohort: int
    num_clients: int


Sampling = Poisson | FixedSize


def import_dp_accounting() -> Any:
    """The module. Raises UserError if it is not installed."""
    try:
        import dp_accounting
    except ImportError as error:
        raise UserError(
            f"strategy.privacy: needs the package dp-accounting ({error}); pip install 'jaxdist[privacy]'"
        ) from None
    logging.getLogger("absl").addFilter(_tells_something)
    return dp_accounting


def _tells_something(record: logging.LogRecord) -> bool:
    """Not that a series did not converge for an order, which is then left out: the bound by the others holds."""
    return "failed to converge" not in record.getMessage()


def default_delta(num_clients: int) -> float:
    """N^-1.1, a little below the 1 / N at which a mechanism that publishes one client whole would pass, and 1e-5 at
    most: of few clients 1 / N is a large chance."""
    return min(num_clients**-1.1, 1e-5)


@dataclass
class Accountant:
    """Of rounds that are all alike. Raises UserError if dp-accounting is missing or has no bound for the sampling."""

    noise_multiplier: float
    sampling: Sampling
    kind: Kind = "pld"
    _one_round: Any = field(default=None, init=False, repr=False)
    _known: dict[tuple[int, float], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        import_dp_accounting()
        check_bound(self.sampling, self.kind)

    @property
    def relation(self) -> str:
        """What two data sets differ in that cannot be told apart."""
        return "one client replaced" if isinstance(_reduced(self.sampling), FixedSize) else "one client more or less"

    def epsilon(self, rounds: int, delta: float) -> float:
        """After so many rounds, rounded up by what the discretisation may be off.

        With PLD one round's distribution is kept and composed with itself, which takes about a fifth of a second, and
        seconds with much epsilon; with RDP less. A value is computed once.
        """
        if rounds == 0:
            return 0.0
        if (rounds, delta) not in self._known:
            self._known[rounds, delta] = self._epsilon(rounds, delta)
        return self._known[rounds, delta]

    def rounds_until(self, epsilon: float, delta: float, most: int) -> int:
        """The largest number of rounds, `most` at the most, after which no more than `epsilon` is spent."""
        if self.epsilon(1, delta) > epsilon:
            return 0
        low, high = 1, 2  # epsilon(low) fits; doubled first, since many rounds are slow to compose
        while high <= most and self.epsilon(high, delta) <= epsilon:
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle, delta) <= epsilon else (low, middle)
        return low

    def _epsilon(self, rounds: int, delta: float) -> float:
        if self.kind == "rdp":
            accountant = _rdp(self.sampling)
            accountant.compose(_event(self.noise_multiplier, self.sampling), rounds)
            return float(accountant.get_epsilon(delta))
        if self._one_round is None:
            assert isinstance(self.sampling, Poisson) or self.sampling.cohort == self.sampling.num_clients
            self._one_round = _one_round(self.noise_multiplier, _reduced(self.sampling).probability)
        return float(self._one_round.self_compose(rounds).get_epsilon_for_delta(delta))


def calibrate(target_epsilon: float, delta: float, sampling: Sampling, rounds: int, kind: Kind = "pld") -> float:
    """A noise multiplier with which `rounds` rounds spend `target_epsilon` at most: the least, to 1e-3 and rounded
    up, but no less than `LEAST_NOISE`, and with PLD than half of what RDP asks for.

    Raises UserError as `Accountant` does.
    """
    check_bound(sampling, kind)
    dp = import_dp_accounting()

    def search(accountant: Any, bracket: Any) -> float:
        return dp.calibrate_dp_mechanism(
            accountant,
            lambda z: dp.SelfComposedDpEvent(_event(z, sampling), rounds),
            target_epsilon,
            delta,
            bracket_interval=bracket,
            tol=5e-4,
        )

    found = max(search(lambda: _rdp(sampling), dp.LowerEndpointAndGuess(1e-3, 1.0)), LEAST_NOISE)
    if kind == "pld":
        # RDP's answer is enough, and half of it hardly ever is. Nothing is looked for below: less noise takes more
        # time.
        least = max(found / 2, LEAST_NOISE)
        if Accountant(least, sampling).epsilon(rounds, delta) <= target_epsilon:
            return _rounded_up(least)
        by_pld = functools.partial(dp.pld.PLDAccountant, value_discretization_interval=_interval(least))
        found = search(by_pld, dp.LowerEndpointAndGuess(least, found))
    return _rounded_up(found)


def _rounded_up(noise_multiplier: float) -> float:
    return math.ceil(noise_multiplier * 1000) / 1000


def check_bound(sampling: Sampling, kind: Kind) -> None:
    """Raises UserError where there is no bound."""
    if kind == "pld" and isinstance(_reduced(sampling), FixedSize):
        raise UserError(
            "strategy.privacy.accountant: pld has no bound for cohorts of a fixed size; sample clients by Poisson "
            "(the tightest), or use rdp, which bounds the replacement of one client"
        )


def _reduced(sampling: Sampling) -> Any:
    """A fixed size that is everybody is no sampling."""
    if isinstance(sampling, FixedSize) and sampling.cohort == sampling.num_clients:
        return Poisson(1.0)
    return sampling


def _event(noise_multiplier: float, sampling: Sampling) -> Any:
    dp, sampling = import_dp_accounting(), _reduced(sampling)
    if isinstance(sampling, FixedSize):
        halved = dp.GaussianDpEvent(noise_multiplier / 2)
        return dp.SampledWithoutReplacementDpEvent(sampling.num_clients, sampling.cohort, halved)
    return dp.PoissonSampledDpEvent(sampling.probability, dp.GaussianDpEvent(noise_multiplier))


def _rdp(sampling: Sampling) -> Any:
    relations = import_dp_accounting().NeighboringRelation
    replaces = isinstance(_reduced(sampling), FixedSize)
    relation = relations.REPLACE_ONE if replaces else relations.ADD_OR_REMOVE_ONE
    return import_dp_accounting().rdp.RdpAccountant(neighboring_relation=relation)


def _one_round(noise_multiplier: float, probability: float) -> Any:
    return import_dp_accounting().pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=_interval(noise_multiplier), sampling_prob=probability
    )


def _interval(noise_multiplier: float) -> float:
    """dp-accounting's own, 1e-4; with little noise, where a round's loss goes up to about 1 / (2 z^2) + 10 / z, a
    part of that, so that a distribution has hardly more than 200,000 values. Losses are rounded up all the same."""
    z = noise_multiplier
    return max(1e-4, (1 / (2 * z**2) + 10 / z) / 200_000)
