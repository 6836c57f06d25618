"""Who takes part, in words."""

from jaxdist.config.federated import Federated
from jaxdist.config.participation import Availability, FedBuff
from jaxdist.federated.participation import selected


def describe(strategy: Federated, num_candidates: int) -> str:
    """One line, for `train --explain`."""
    if strategy.asynchronous is not None:
        of = strategy.asynchronous
        every = (
            f"every {of.buffer} messages" if isinstance(of, FedBuff) else f"each message, by {of.mixing:g} of the way"
        )
        return f"No rounds ({of.kind}): {of.concurrency} of them train at any time, and the server steps with {every}"
    size, at = strategy.clients_per_round or num_candidates, strategy.availability or Availability()
    drawn = {
        "uniform": f"{selected(size, at.over_selection)} of them",
        "weighted": f"{size} draws by samples, with replacement",
        "poisson": f"each with probability {size / num_candidates:.3g}, {size} on average",
    }[strategy.sampling]
    then = [
        f"the first {size} count" if at.over_selection > 1 else "",
        f"a part of {at.dropout:g} drops out" if at.dropout else "",
        "those that are there" if at.trace is not None else "",
        f"the end is after {at.deadline:g} virtual seconds" if at.deadline is not None else "",
    ]
    return "; ".join(["A round: " + drawn, *filter(None, then)])
