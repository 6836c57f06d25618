"""What a server and its silos say to each other.

`nonce` names a process of a silo: what is said to or by another process of that name counts no more. `epoch` numbers
the server's processes: it grows from one to the next. `round` numbers rounds, `attempt` the attempts at one, which
grow where a round with secure aggregation came to no sum.

Any message may be lost, doubled, delayed or overtaken: who waits for an answer says it again, who hears it twice does
nothing the second time.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxdist.transport import plain
from jaxdist.transport.plain import kind

NEVER = -1  # in place of a round


@dataclass(frozen=True)
class Message(plain.Message):
    kinds: ClassVar[dict[str, type[plain.Message]]] = {}


@kind
@dataclass(frozen=True)
class Here(Message):
    """A silo to the server, again and again: it is there. The last three are of the newest `Train` that it has."""

    nonce: str
    identity: str  # of the config that it was started with
    epoch: int
    round: int
    attempt: int


@kind
@dataclass(frozen=True)
class Train(Message):
    """The server to each silo of a cohort."""

    nonce: str
    epoch: int
    round: int
    attempt: int
    run: str  # a name of its own, which it keeps when it goes on from a checkpoint
    after: int  # the last round in which the silo's update was counted: its own state is as of then
    keep: tuple[int, ...]  # rounds whose states it may be asked to go back to, if the server is lost
    arrays: tuple[np.ndarray, ...]  # what clients are sent: parameters, statistics, what the algorithm broadcasts


@kind
@dataclass(frozen=True)
class Update(Message):
    """A silo to the server, until it is `Heard`."""

    nonce: str
    epoch: int
    round: int
    arrays: tuple[np.ndarray, ...]  # its upload, and what it measured


@kind
@dataclass(frozen=True)
class Heard(Message):
    """The server to a silo: its update of this round has come, whether it counts or not."""

    nonce: str
    epoch: int
    round: int


@kind
@dataclass(frozen=True)
class Secure(Message):
    """Either way: a message of secure aggregation, in the attempt at a round; its vector beside it."""

    nonce: str
    epoch: int
    round: int
    attempt: int
    said: dict[str, Any]
    arrays: tuple[np.ndarray, ...]


@kind
@dataclass(frozen=True)
class Decline(Message):
    """A silo to the server: it says nothing more in this attempt at a round."""

    nonce: str
    epoch: int
    round: int
    attempt: int


@kind
@dataclass(frozen=True)
class Refused(Message):
    """The server to a process that can have no part in this run."""

    nonce: str
    reason: str


@kind
@dataclass(frozen=True)
class Over(Message):
    """The server to a silo, until it hears `Bye`: the process ends with this exit code."""

    nonce: str
    code: int
    reason: str


@kind
@dataclass(frozen=True)
class Bye(Message):
    """A silo to the server: it leaves."""

    nonce: str
