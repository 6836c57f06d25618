"""From the block `privacy:` to the mechanism and what it may spend."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import AdaptiveClipping, CentralPrivacy, LocalPrivacy
from jaxdist.federated.privacy.accountant import Accountant, FixedSize, Sampling, calibrate, default_delta
from jaxdist.federated.privacy.central import AdaptiveClip, Central
from jaxdist.federated.privacy.local import Local, local


@dataclass(frozen=True)
class Budget:
    """`last_round`: after which one more would spend too much, None if nothing says so; `epsilon(rounds)`: what so
    many spend."""

    accountant: Accountant
    delta: float
    last_round: int | None

    def epsilon(self, rounds: int) -> float:
        return self.accountant.epsilon(rounds, self.delta)

    @cached_property
    def _by_rdp(self) -> Accountant:
        return dataclasses.replace(self.accountant, kind="rdp")

    def columns(self, rounds: int) -> dict[str, float]:
        """`epsilon.rdp` of a record, with accountant pld `epsilon.pld` too."""
        return {f"epsilon.{of.kind}": of.epsilon(rounds, self.delta) for of in (self._by_rdp, self.accountant)}

    def explained(self) -> str:
        own = self.accountant
        return (
            f"differential privacy ({own.relation}): noise of {own.noise_multiplier:g} clips on the sum, "
            f"delta {self.delta:.3g}; epsilon by {own.kind}, {self.epsilon(1):.3g} after the first round"
        )


@dataclass(frozen=True)
class LocalBudget:
    """Of a client that sends a message in every round; of others it is less."""

    mechanism: Local
    delta: float

    def columns(self, rounds: int) -> dict[str, float]:
        """`epsilon.local` of a record."""
        return {"epsilon.local": self.mechanism.epsilon(rounds, self.delta)}

    def explained(self) -> str:
        return (
            f"local differential privacy: noise of {self.mechanism.stddev:.3g} on each element of a message, delta "
            f"{self.delta:.3g}; epsilon {self.mechanism.epsilon(1, self.delta):.3g} a message"
        )


def build_central(
    block: CentralPrivacy, sampling: Sampling, *, num_clients: int, num_rounds: int, rounding_norm: float = 0.0
) -> tuple[Central, Budget]:
    """Raises UserError if dp-accounting is missing or has no bound, if not one round fits `stop_at_epsilon`, and as
    delta_in_force."""
    delta = delta_in_force(block.delta, num_clients)
    noise_multiplier = block.noise_multiplier
    if noise_multiplier is None:
        assert block.target_epsilon is not None
        noise_multiplier = calibrate(block.target_epsilon, delta, sampling, num_rounds, block.accountant)
    accountant = Accountant(noise_multiplier, sampling, block.accountant)
    last_round = None
    if block.stop_at_epsilon is not None:
        last_round = accountant.rounds_until(block.stop_at_epsilon, delta, num_rounds)
        if last_round == 0:
            raise UserError(
                f"strategy.privacy.stop_at_epsilon: the first round alone spends {accountant.epsilon(1, delta):.3g}, "
                f"more than {block.stop_at_epsilon:g}; raise noise_multiplier or stop_at_epsilon"
            )
    if isinstance(block.clip, AdaptiveClipping):
        start, adaptive = block.clip.start, AdaptiveClip(block.clip.quantile, block.clip.learning_rate)
    else:
        start, adaptive = block.clip, None
    cohort = sampling.cohort if isinstance(sampling, FixedSize) else sampling.probability * num_clients
    return Central(noise_multiplier, cohort, start, adaptive, rounding_norm), Budget(accountant, delta, last_round)


def delta_in_force(delta: float | None, num_clients: int) -> float:
    """What is given, or the default. Raises UserError for one that promises nothing, and for a client alone."""
    if num_clients < 2:
        raise UserError("strategy.privacy: of one client alone, all that is learnt is its own; at least 2 are needed")
    delta = default_delta(num_clients) if delta is None else delta
    if delta >= 1 / num_clients:
        raise UserError(
            f"strategy.privacy.delta: {delta:g} is no less than 1 / {num_clients} clients: publishing one client "
            f"whole would pass; leave it out ({default_delta(num_clients):.2g}) or lower it"
        )
    return delta


def build_local(block: LocalPrivacy, num_clients: int) -> tuple[Local, float]:
    """The mechanism and the delta of a message. Raises UserError if dp-accounting is missing, and as
    delta_in_force."""
    delta = delta_in_force(block.delta, num_clients)
    return local(block.clip, block.epsilon, delta), delta
