"""The log of decisions: what the lead writes and every shard does, in the same order."""

from dataclasses import dataclass

from jaxdist.parameter_server.messages import Claim, Entry
from jaxdist.transport.plain import kind


@kind
@dataclass(frozen=True)
class Joins(Entry):
    """The worker takes part, with those of its claims whose samples nobody else has; older processes are fenced."""

    worker: str
    incarnation: int
    last: int
    claims: tuple[Claim, ...]


@kind
@dataclass(frozen=True)
class Leaves(Entry):
    """The worker takes part no more: its staged parts are dropped, its samples free for others, it is fenced."""

    worker: str
    incarnation: int
    reason: str  # lease | straggler | replaced | left | finished


@kind
@dataclass(frozen=True)
class Grant(Entry):
    """The worker may compute its next push, on `count` samples: the freed ones first, then the next of the order."""

    worker: str
    incarnation: int
    count: int
    local_steps: int


@dataclass(frozen=True)
class Applied:
    """A push in an update; sums, times and ages are for the record."""

    worker: str
    incarnation: int
    seq: int
    weight: float
    behind: tuple[int, ...]  # by shard: versions since what it had given the worker for it
    age: float  # seconds since it was begun
    seconds: float  # of computing
    waited: float
    sums: dict[str, float]

    @property
    def staleness(self) -> int:
        """In versions, of the oldest parameters that it was computed on."""
        return max(self.behind)


@kind
@dataclass(frozen=True)
class Apply(Entry):
    """One update of the parameters, by these pushes, summed in this order."""

    contributions: tuple[Applied, ...]
    oldest_base: int  # no later contribution was computed on parameters before this version


@kind
@dataclass(frozen=True)
class Discard(Entry):
    """A push that will never be applied."""

    worker: str
    incarnation: int
    seq: int
    reason: str  # stale | late | nonfinite | empty: of weight 0
    seconds: float  # as in Applied
    waited: float


@kind
@dataclass(frozen=True)
class Keep(Entry):
    """Keep the parameters as they are now, for evaluators."""


@kind
@dataclass(frozen=True)
class Cut(Entry):
    """Save the shards as they are now."""


@kind
@dataclass(frozen=True)
class CutCommitted(Entry):
    """The checkpoint of the last Cut at this version is on disk and believed."""

    version: int
