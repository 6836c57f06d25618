"""A client's part of a round: one object a round, with keys of its own."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from jaxdist.federated.secure_aggregation import keys, shares
from jaxdist.federated.secure_aggregation.graph import holders, neighbours_of
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
    Sealed,
    Share,
    Shares,
    Survivors,
)
from jaxdist.federated.secure_aggregation.rules import ProtocolError, Rules, TooFewClients

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True)
class Identity:
    """Who a client is, beyond a round: its own key, and everybody's public key, known from elsewhere than the server
    (certificates, a file). With it, keys and lists of survivors are signed."""

    own: Ed25519PrivateKey
    of: Mapping[int, Ed25519PublicKey]


class Client:
    """Methods in the order of a round; each takes what the server said and returns what to say next.

    The same message again gets the same answer; another one in its place, or one out of order, is a ProtocolError,
    and so is everything that an honest server would not say. `TooFewClients` if too many have dropped.
    """

    def __init__(
        self,
        rules: Rules,
        round_id: bytes,
        client: int,
        *,
        identity: Identity | None = None,
        entropy: keys.Entropy = os.urandom,
    ):
        if identity is not None and not rules.is_complete:
            raise ProtocolError("with identities all clients are neighbours: a server that lies would choose them")
        self._rules, self._round_id, self._client = rules, round_id, client
        self._identity = identity
        self._mask_pair = keys.KeyPair(entropy(keys.SECRET_BYTES))
        self._share_pair = keys.KeyPair(entropy(keys.SECRET_BYTES))
        self._seed = entropy(keys.SECRET_BYTES)
        self._answers: dict[type[Message], tuple[Message, Message]] = {}
        self._is_lied_to = False
        self._public: dict[int, PublicKeys] = {}  # of the neighbours
        self._roster: tuple[int, ...] = ()
        self._held: dict[int, tuple[bytes, bytes]] = {}  # by owner: shares of its seed and its mask key
        self._survivors: tuple[int, ...] = ()

    def advertise(self) -> PublicKeys:
        mask_key, share_key = self._mask_pair.public, self._share_pair.public
        signature = b""
        if self._identity is not None:
            text = keys.signed_keys(self._round_id, self._client, mask_key, share_key)
            signature = keys.sign(self._identity.own, text)
        return PublicKeys(self._round_id, self._client, mask_key, share_key, signature)

    def share(self, roster: Roster) -> Shares:
        return self._once(roster, None, self._share)

    def mask(self, forwarded: Forwarded, vector: np.ndarray) -> Masked:
        """`vector`: unsigned words as the rules say; not changed."""
        if vector.shape != (self._rules.length,) or vector.dtype != self._rules.dtype:
            raise ValueError(
                f"the vector is {vector.dtype} {vector.shape}; the round is of {self._rules.dtype} "
                f"({self._rules.length},)"
            )
        return self._once(forwarded, Roster, lambda message: self._mask(message, vector))

    def survivors(self, survivors: Survivors) -> Agreed | Reveal:
        """A signature with identities, else the shares that the server may have."""
        answer: Agreed | Reveal = self._once(survivors, Forwarded, self._agree)
        return answer

    def reveal(self, agreements: Agreements) -> Reveal:
        """With identities: after enough holders have signed the same survivors."""
        return self._once(agreements, Survivors, self._reveal_agreed)

    def _once(self, message: Message, after: type[Message] | None, answer: Callable[..., Answer]) -> Answer:
        """The answer to a message, or what it was if this has been answered."""
        kind = type(message)
        if self._is_lied_to:
            raise ProtocolError("the server has said two things in one place: nothing more is said")
        if message.round_id != self._round_id:
            raise ProtocolError(f"{kind.__name__} is of another round")
        if kind in self._answers:
            before, said = self._answers[kind]
            if before != message:
                self._is_lied_to = True
                raise ProtocolError(f"a second, different {kind.__name__} in one round: nothing more is said")
            return said  # type: ignore[return-value]
        if after is not None and after not in self._answers:
            raise ProtocolError(f"{kind.__name__} before {after.__name__}")
        fresh = answer(message)
        self._answers[kind] = (message, fresh)
        return fresh

    def _share(self, roster: Roster) -> Shares:
        rules, me = self._rules, self._client
        if list(roster.clients) != sorted(set(roster.clients)) or me not in roster.clients or roster.clients[0] < 0:
            raise ProtocolError("the roster is no ascending list with this client on it")
        if len(roster.clients) > rules.num_clients:
            raise ProtocolError(f"{len(roster.clients)} clients on the roster of a round of {rules.num_clients}")
        if len(roster.clients) < rules.min_clients:
            raise TooFewClients("clients on the roster", len(roster.clients), rules.min_clients)
        if len(roster.graph_seed) != keys.SECRET_BYTES:
            raise ProtocolError(f"a graph is drawn from {keys.SECRET_BYTES} octets, not {len(roster.graph_seed)}")
        known = neighbours_of(me, roster.clients, roster.graph_seed, rules.degree)
        if [one.client for one in roster.neighbours] != list(known):
            raise ProtocolError("the keys are not those of this client's neighbours in the graph")
        self._check_keys(roster.neighbours)
        self._public = {one.client: one for one in roster.neighbours}
        self._roster = roster.clients
        mine = holders(me, known)
        if len(mine) < rules.threshold:
            raise TooFewClients("holders of this client's shares", len(mine), rules.threshold)
        of_seed = shares.split(self._seed, rules.threshold, len(mine))
        of_key = shares.split(self._mask_pair.secret, rules.threshold, len(mine))
        pieces = dict(zip(mine, zip(of_seed, of_key, strict=True), strict=True))
        self._held[me] = pieces.pop(me)
        sealed = [Sealed(me, j, keys.seal(self._sealing_key(me, j), a + b)) for j, (a, b) in pieces.items()]
        return Shares(self._round_id, me, keys.commitment(self._seed, self._round_id), tuple(sealed))

    def _check_keys(self, public: tuple[PublicKeys, ...]) -> None:
        everybodys = [key for one in (self.advertise(), *public) for key in (one.mask_key, one.share_key)]
        if len(set(everybodys)) < len(everybodys):
            raise ProtocolError("two public keys on the roster are the same")
        for one in public:
            if one.round_id != self._round_id:
                raise ProtocolError(f"the keys of client {one.client} are of another round")
            if self._identity is not None:
                text = keys.signed_keys(self._round_id, one.client, one.mask_key, one.share_key)
                keys.verify(self._identity_of(one.client), one.signature, text, f"keys of client {one.client}")

    def _mask(self, forwarded: Forwarded, vector: np.ndarray) -> Masked:
        owners = [one.owner for one in forwarded.sealed]
        if owners != sorted(set(owners)) or not set(owners) <= self._public.keys():
            raise ProtocolError("the shares are not of neighbours, one each, in ascending order")
        if len(owners) + 1 < self._rules.threshold:
            raise TooFewClients("holders that are left", len(owners) + 1, self._rules.threshold)
        opened = {}
        for one in forwarded.sealed:
            text = keys.unseal(self._sealing_key(one.owner, self._client), one.text)
            if one.holder != self._client or len(text) != 2 * keys.SECRET_BYTES:
                raise ProtocolError(f"the share of client {one.owner} is not for this client, or no share")
            opened[one.owner] = (text[: keys.SECRET_BYTES], text[keys.SECRET_BYTES :])
        self._held |= opened
        masked = vector.copy()
        add_mask(masked, keys.mask_seed(self._seed, self._round_id))
        for other in owners:
            seed = self._mask_pair.agree(self._public[other].mask_key, b"mask", self._round_id)
            add_mask(masked, seed, subtract=self._client > other)
        return Masked(self._round_id, self._client, (masked,))

    def _agree(self, message: Survivors) -> Agreed | Reveal:
        listed = message.clients
        if list(listed) != sorted(set(listed)) or not set(listed) <= set(self._roster) or self._client not in listed:
            raise ProtocolError("the survivors are no ascending list of clients of the roster with this client on it")
        unknown = (set(listed) & self._public.keys()) - self._held.keys()
        if unknown:
            raise ProtocolError(f"clients {sorted(unknown)} are said to survive, but had dropped before")
        if len(listed) < self._rules.min_clients:
            raise TooFewClients("survivors", len(listed), self._rules.min_clients)
        around = len(self._held.keys() & set(listed))
        if around < self._rules.threshold:
            raise TooFewClients("holders that survive", around, self._rules.threshold)
        self._survivors = listed
        if self._identity is None:
            return self._reveal()
        signature = keys.sign(self._identity.own, keys.signed_survivors(self._round_id, listed))
        return Agreed(self._round_id, self._client, signature)

    def _reveal_agreed(self, message: Agreements) -> Reveal:
        if self._identity is None:
            raise ProtocolError("agreements in a round without identities")
        text = keys.signed_survivors(self._round_id, self._survivors)
        signers = [one.client for one in message.agreed]
        if signers != sorted(set(signers)) or not set(signers) <= set(self._survivors):
            raise ProtocolError("the agreements are not of survivors, one each, in ascending order")
        for one in message.agreed:
            keys.verify(self._identity_of(one.client), one.signature, text, f"survivors by client {one.client}")
        if len(signers) < self._rules.threshold:
            raise TooFewClients("clients that agree on the survivors", len(signers), self._rules.threshold)
        return self._reveal()

    def _reveal(self) -> Reveal:
        """Of each owner one of the two, by whether it survived: both would take all masks off its vector."""
        alive = set(self._survivors)
        seeds = tuple(Share(owner, seed) for owner, (seed, _) in sorted(self._held.items()) if owner in alive)
        of_keys = tuple(Share(owner, key) for owner, (_, key) in sorted(self._held.items()) if owner not in alive)
        return Reveal(self._round_id, self._client, seeds, of_keys)

    def _sealing_key(self, owner: int, holder: int) -> bytes:
        other = holder if owner == self._client else owner
        purpose = keys.direction(b"share", owner, holder)
        return self._share_pair.agree(self._public[other].share_key, purpose, self._round_id)

    def _identity_of(self, client: int) -> Ed25519PublicKey:
        assert self._identity is not None
        if client not in self._identity.of:
            raise ProtocolError(f"client {client} has no identity that is known here")
        return self._identity.of[client]
