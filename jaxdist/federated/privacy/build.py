"""From the block `privacy:` to the mechanism and what it may spend."""

from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import AdaptiveClipping, CentralPrivacy, LocalPrivacy
from jaxdist.federated.privacy.accountant import Accountant, FixedSize, Sampling, calibrate, default_delta
from jaxdist.federated.privacy.central import AdaptiveClip, Central
from jaxdist.federated.privacy.local import Local, local


@dataclass(frozen=True)
class Budget:
    """`last_round`: how many rounds may be run; `accountant.epsilon(rounds, delta)` says what they spend."""

    accountant: Accountant
    delta: float
    last_round: int

    def epsilon(self, rounds: int) -> float:
        return self.accountant.epsilon(rounds, self.delta)


def build_central(
    block: CentralPrivacy, sampling: Sampling, *, num_clients: int, num_rounds: int, rounding_norm: float = 0.0
) -> tuple[Central, Budget]:
    """Raises UserError if dp-accounting is missing or has no bound, and if not one round fits `stop_at_epsilon`."""
    delta = default_delta(num_clients) if block.delta is None else block.delta
    noise_multiplier = block.noise_multiplier
    if noise_multiplier is None:
        assert block.target_epsilon is not None
        noise_multiplier = calibrate(block.target_epsilon, delta, sampling, num_rounds, block.accountant)
    accountant = Accountant(noise_multiplier, sampling, block.accountant)
    last_round = num_rounds
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


def build_local(block: LocalPrivacy, num_clients: int) -> tuple[Local, float]:
    """The mechanism and the delta of a message. Raises UserError if dp-accounting is missing."""
    delta = default_delta(num_clients) if block.delta is None else block.delta
    return local(block.clip, block.epsilon, delta), delta
