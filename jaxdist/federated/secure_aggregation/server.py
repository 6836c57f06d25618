"""The server's part of a round: it passes messages on, adds up masked vectors, and takes the masks off the sum."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxdist.federated.secure_aggregation import keys, shares
from jaxdist.federated.secure_aggregation.graph import holders, neighbours
from jaxdist.federated.secure_aggregation.masks import add_mask
from jaxdist.federated.secure_aggregation.messages import (
    Agreed,
    Agreements,
    Forwarded,
    Masked,
    Message,
    PublicKeys,
    Reveal,
    Roster,
    Share,
    Shares,
    Survivors,
)
from jaxdist.federated.secure_aggregation.rules import ProtocolError, Rules, TooFewClients

Phase = Literal["keys", "shares", "vectors", "agreement", "reveal", "over"]
_EXPECTED: dict[Phase, type[Message]] = {
    "keys": PublicKeys,
    "shares": Shares,
    "vectors": Masked,
    "agreement": Agreed,
    "reveal": Reveal,
}


@dataclass(frozen=True)
class SecureSum:
    """`total`: words, the sum modulo their size of the vectors of `clients`."""

    total: np.ndarray
    clients: tuple[int, ...]


class Server:
    """Give it what comes (`receive`), and when all have answered (`waiting_for` is empty) or a deadline has passed,
    `advance`: it says what to send to whom. After "reveal" there is `result`.

    `signs`: clients have identities. `TooFewClients` when so many have dropped that there is no sum yet: wait for
    more and try again, or give the round up. Another round needs new keys and, of whoever has sent its masked vector,
    **another vector**: answers to a round given up may still come, so that a curious server could have its sum, and
    if the same vectors go into a second round without one client, the difference is that client's.
    """

    def __init__(
        self,
        rules: Rules,
        round_id: bytes,
        clients: Collection[int],
        *,
        signs: bool = False,
        entropy: keys.Entropy = os.urandom,
    ):
        if len(clients) != rules.num_clients:
            raise ValueError(f"{len(clients)} clients in a round of {rules.num_clients}")
        self.phase: Phase = "keys"
        self.result: SecureSum | None = None
        self._rules, self._round_id, self._signs = rules, round_id, signs
        self._graph_seed = entropy(keys.SECRET_BYTES)
        self._asked = tuple(sorted(clients))
        self._came: dict[int, Any] = {}  # answers of this phase, by client
        self._public: dict[int, PublicKeys] = {}
        self._graph: dict[int, tuple[int, ...]] = {}
        self._shares: dict[int, Shares] = {}
        self._total = np.zeros(rules.length, rules.dtype)
        self._survivors: tuple[int, ...] = ()

    @property
    def waiting_for(self) -> frozenset[int]:
        return frozenset(self._asked) - self._came.keys()

    @property
    def enough(self) -> bool:
        """Whether so many have answered that `advance` can go on."""
        return len(self._came) >= self._needed

    @property
    def _needed(self) -> int:
        return self._rules.threshold if self.phase in ("agreement", "reveal") else self._rules.min_clients

    def receive(self, client: int, message: Message) -> bool:
        """Whether what `client` sent counts: not if it comes too late, twice, or from another round. Raises
        ProtocolError for what no honest client says; leave its sender out, and go on."""
        if message.round_id != self._round_id or type(message) is not _EXPECTED.get(self.phase):
            return False
        if message.client != client:  # type: ignore[attr-defined]
            raise ProtocolError(f"client {client} speaks for another")
        if client not in self.waiting_for:
            return False
        if isinstance(message, PublicKeys):
            for key in (message.mask_key, message.share_key):
                keys.check_public(key, self._round_id)
        if isinstance(message, Shares):
            self._check_shares(message)
        if isinstance(message, Masked):
            if message.vector.shape != self._total.shape or message.vector.dtype != self._total.dtype:
                raise ProtocolError(f"client {client}: a vector of {message.vector.dtype} {message.vector.shape}")
            self._total += message.vector
            self._came[client] = True  # the vector is in the sum and kept nowhere else
        else:
            self._came[client] = message
        return True

    def advance(self) -> dict[int, Message]:
        """To the next phase: what to send to each client. Raises TooFewClients if not enough have answered, and
        ProtocolError where secrets were altered: then the round is over."""
        if self.phase == "over":
            raise ProtocolError("the round is over")
        came = tuple(sorted(self._came))
        if not self.enough:
            raise TooFewClients(f"clients that answered in phase {self.phase}", len(came), self._needed)
        match self.phase:
            case "keys":
                answers = self._send_roster(came)
            case "shares":
                answers = self._forward_shares(came)
            case "vectors":
                self._survivors = came
                survivors = Survivors(self._round_id, came)
                answers = dict.fromkeys(came, survivors)
                self.phase = "agreement" if self._signs else "reveal"
            case "agreement":
                agreements = Agreements(self._round_id, tuple(self._came[one] for one in came))
                answers = dict.fromkeys(came, agreements)
                self.phase = "reveal"
            case "reveal":
                self.result = SecureSum(self._unmasked(), self._survivors)
                answers, self.phase = {}, "over"
        self._asked, self._came = tuple(answers), {}
        return answers

    def _send_roster(self, came: tuple[int, ...]) -> dict[int, Message]:
        self._public = dict(self._came)
        self._graph = neighbours(came, self._graph_seed, self._rules.degree)
        self.phase = "shares"
        return {
            one: Roster(
                self._round_id, came, self._graph_seed, tuple(self._public[other] for other in self._graph[one])
            )
            for one in came
        }

    def _check_shares(self, message: Shares) -> None:
        addressed = [(one.owner, one.holder) for one in message.sealed]
        if addressed != [(message.client, other) for other in self._graph[message.client]]:
            raise ProtocolError(f"client {message.client}: shares for others than its neighbours")

    def _forward_shares(self, came: tuple[int, ...]) -> dict[int, Message]:
        self._shares = dict(self._came)
        self.phase = "vectors"
        sealed = {(s.owner, s.holder): s for one in came for s in self._shares[one].sealed}
        return {
            one: Forwarded(
                self._round_id, tuple(sealed[other, one] for other in self._graph[one] if other in self._shares)
            )
            for one in came
        }

    def _unmasked(self) -> np.ndarray:
        """The sum: without what `total` holds beyond it, each survivor's own mask, and for each who dropped between
        shares and vector the masks that its neighbours share with it."""
        survivors = set(self._survivors)
        of_seeds, of_keys = self._revealed("seeds"), self._revealed("keys")
        # All secrets first: where one is missing, `total` must stay as it is.
        seeds = {one: self._put_together(one, of_seeds) for one in self._survivors}
        pairs = {
            one: keys.KeyPair(self._put_together(one, of_keys))
            for one in sorted(self._shares.keys() - survivors)
            if survivors.intersection(self._graph[one])
        }
        altered = [one for one, pair in pairs.items() if pair.public != self._public[one].mask_key]
        for one, seed in seeds.items():
            if keys.commitment(seed, self._round_id) != self._shares[one].commitment:
                altered.append(one)
        if altered:
            self.phase = "over"
            raise ProtocolError(f"shares of the secrets of clients {altered} were altered: there is no sum")
        total = self._total.copy()
        for seed in seeds.values():
            add_mask(total, keys.mask_seed(seed, self._round_id), subtract=True)
        for one, pair in pairs.items():
            for other in survivors.intersection(self._graph[one]):
                shared = pair.agree(self._public[other].mask_key, b"mask", self._round_id)
                add_mask(total, shared, subtract=other < one)  # `other` added it, being the smaller
        return total

    def _revealed(self, which: Literal["seeds", "keys"]) -> dict[int, dict[int, bytes]]:
        """By owner and holder."""
        found: dict[int, dict[int, bytes]] = {}
        for holder, message in self._came.items():
            given: tuple[Share, ...] = getattr(message, which)
            for one in given:
                if one.owner in self._graph and holder in (one.owner, *self._graph[one.owner]):
                    found.setdefault(one.owner, {})[holder] = one.share
        return found

    def _put_together(self, owner: int, revealed: dict[int, dict[int, bytes]]) -> bytes:
        held = revealed.get(owner, {})
        order = {holder: number for number, holder in enumerate(holders(owner, self._graph[owner]))}
        if len(held) < self._rules.threshold:
            raise TooFewClients(f"shares of client {owner}'s secret", len(held), self._rules.threshold)
        chosen = sorted(held)[: self._rules.threshold]
        if any(len(held[holder]) != keys.SECRET_BYTES for holder in chosen):
            self.phase = "over"
            raise ProtocolError(f"the shares of client {owner}'s secret were altered: there is no sum")
        return shares.combine([(order[holder], held[holder]) for holder in chosen])
