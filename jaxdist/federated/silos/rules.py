"""What the run's config says to the protocol, and what the protocol asks of whoever drives it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxdist.federated.secure_aggregation.rules import Rules as SumRules
from jaxdist.federated.secure_aggregation.server import SecureSum
from jaxdist.federated.silos.messages import Update

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Rules:
    """Times in seconds."""

    identity: str  # of the config
    num_silos: int
    min_silos: int  # updates that a round needs
    deadline: float  # of a round, or of each phase of secure aggregation
    lease: float  # of silence after which a silo counts as lost
    retry: float = 1.0  # before something is said again
    sums: SumRules | None = None  # of secure aggregation, where the server learns the sum alone


@dataclass(frozen=True)
class Opened:
    """A round that is to be gathered.

    Args:
      run: a name of the run's own.
      cohort: clients, ascending.
      arrays: what they are sent.
      after: of a client, the last round in which its update was counted; those that have none are left out.
      keep: of a client, rounds whose states it may have to go back to.
    """

    run: str
    round: int
    cohort: tuple[int, ...]
    arrays: Arrays
    after: Mapping[int, int] = field(default_factory=dict)
    keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


# Effects, besides those of transport.machine.


@dataclass(frozen=True)
class Close:
    """Of the server: make the next global parameters of these updates, or of this sum; then open another round, or
    finish. Exactly the clients named count in it. With secure aggregation and no sum, the round was lost: nothing
    changes."""

    round: int
    updates: Mapping[int, Update]
    total: SecureSum | None = None


@dataclass(frozen=True)
class Work:
    """Of a silo: train, then call `machine.trained(this, result, now)`. Only one at a time. With secure aggregation
    what came of it is given out once for each round of a run, to whatever process: two sums of one update with
    different others would show it."""

    epoch: int
    run: str
    round: int
    after: int
    keep: tuple[int, ...]
    arrays: Arrays


@dataclass(frozen=True)
class Trained:
    """What came of it. `arrays` are the upload and what was measured; with secure aggregation the upload in words, or
    nothing where it is not finite or was given out before."""

    arrays: Arrays
