"""`gradient_compression:` under strategy federated, where it is of clients' messages, and `strategy.transmit`."""

from typing import Annotated, Any

from pydantic import AfterValidator

from jaxdist.config.base import Pattern, kind_or_target
from jaxdist.config.compression import BF16, FP8, FP16, Adaptive, Int4, Int8, MajorityVote, NoCompression

SENT_DOWN = (BF16, FP16, FP8, Int8, Int4)  # codecs that send something of every element and keep nothing


def _groups(groups: list[list[Pattern]]) -> list[list[Pattern]]:
    if len(groups) == 1:
        raise ValueError("has no effect with a single group, which would be sent in every round; give two or more")
    for i, group in enumerate(groups):
        if not group:
            raise ValueError(f"group {i} is empty: give it patterns of names")
    return groups


Groups = Annotated[list[list[Pattern]], AfterValidator(_groups)]


def communication_problems(config: Any) -> list[str]:
    """Codecs and groups of parameters that mean nothing to clients' messages."""
    return [*_up_problems(config), *_down_problems(config), *_transmit_problems(config.strategy)]


def _up_problems(config: Any) -> list[str]:
    block, budget, where = config.gradient_compression, config.train.budget, "gradient_compression"
    problems = []
    if isinstance(block.up, Adaptive):
        problems.append(
            f"{where}.up: adaptive goes by the norm of one gradient that all replicas have, and clients come and go; "
            "give one codec"
        )
    problems += [
        f"{where}.{place}: majority_vote has no magnitudes, which the mean of messages needs; use sign"
        for place, codec in block.codecs.items()
        if isinstance(codec, MajorityVote)
    ]
    if block.momentum:
        problems.append(
            f"{where}.error_feedback.momentum: is of gradients from step to step, and a client sends what many steps "
            "came to; use optimizer.kind: momentum, or a momentum in strategy.outer_optimizer"
        )
    rounds = budget.rounds or budget.steps
    if rounds is not None and block.dense_steps >= rounds:
        problems.append(
            f"{where}.dense_steps: {block.dense_steps} rounds leave nothing to compress, the budget ends after "
            f"{rounds}; give fewer"
        )
    return problems


def _down_problems(config: Any) -> list[str]:
    down = config.gradient_compression.down
    if isinstance(down, NoCompression):
        return []
    if not isinstance(down, SENT_DOWN):
        allowed = ", ".join(codec.model_fields["kind"].default for codec in SENT_DOWN)
        return [
            f"gradient_compression.down: {kind_or_target(down)} would send parameters with holes, to clients that "
            f"have none to fill them with; allowed under strategy federated: none, {allowed}"
        ]
    if config.strategy.asynchronous is not None:
        return [
            "gradient_compression.down: what one version of the parameters left out goes into the next, and "
            "asynchronous clients get versions of their own; leave it out"
        ]
    return []


def _transmit_problems(strategy: Any) -> list[str]:
    if strategy.transmit and getattr(strategy.algorithm, "kind", None) == "q_fedavg":
        return [
            "strategy.transmit: q_fedavg divides by the length of a client's whole change, of which only a part "
            "would be sent; use another algorithm"
        ]
    return []
