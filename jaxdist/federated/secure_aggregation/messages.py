"""What clients and server of a round say to each other, in the order in which it is said.

`round_id` is in all of them: one of another round is refused.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxdist.transport import plain
from jaxdist.transport.plain import kind


@dataclass(frozen=True)
class Message(plain.Message):
    kinds: ClassVar[dict[str, type[plain.Message]]] = {}

    round_id: bytes


@kind
@dataclass(frozen=True)
class PublicKeys(Message):
    """A client to the server, which passes it on to the client's neighbours. `signature` is empty without
    identities."""

    client: int
    mask_key: bytes
    share_key: bytes
    signature: bytes


@kind
@dataclass(frozen=True)
class Roster(Message):
    """The server to each client: who takes part, what the neighbourhoods are drawn from, and the neighbours' keys."""

    clients: tuple[int, ...]
    graph_seed: bytes
    neighbours: tuple[PublicKeys, ...]


@dataclass(frozen=True)
class Sealed:
    """A share of `owner`'s two secrets for `holder`, whom alone it says anything."""

    owner: int
    holder: int
    text: bytes


@kind
@dataclass(frozen=True)
class Shares(Message):
    """A client to the server: for each neighbour its share, and by what a seed put together is known to be right."""

    client: int
    commitment: bytes
    sealed: tuple[Sealed, ...]


@kind
@dataclass(frozen=True)
class Forwarded(Message):
    """The server to each client: its neighbours' shares for it. Who is not among them has dropped."""

    sealed: tuple[Sealed, ...]


@kind
@dataclass(frozen=True)
class Masked(Message):
    """A client to the server: its vector with all masks on it, words as the rules say."""

    client: int
    arrays: tuple[np.ndarray, ...]  # the vector alone

    def __post_init__(self) -> None:
        if len(self.arrays) != 1:
            raise ValueError(f"Masked: {len(self.arrays)} arrays for one vector")

    @property
    def vector(self) -> np.ndarray:
        return self.arrays[0]


@kind
@dataclass(frozen=True)
class Survivors(Message):
    """The server to each client whose vector came: all whose did."""

    clients: tuple[int, ...]


@kind
@dataclass(frozen=True)
class Agreed(Message):
    """A client to the server, with identities: the survivors that it was shown, signed."""

    client: int
    signature: bytes


@kind
@dataclass(frozen=True)
class Agreements(Message):
    """The server to each client: what its neighbours signed."""

    agreed: tuple[Agreed, ...]


@dataclass(frozen=True)
class Share:
    owner: int
    share: bytes


@kind
@dataclass(frozen=True)
class Reveal(Message):
    """A client to the server: of each survivor its share of the seed, of each who dropped that of the mask key."""

    client: int
    seeds: tuple[Share, ...]
    keys: tuple[Share, ...]
