"""Secure aggregation: the sum is the plain sum for whoever stays, there is none if too few do, and a server, honest
or not, learns nothing else."""

import ast
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats

import jaxdist.federated.secure_aggregation as package
from jaxdist.config.errors import UserError
from jaxdist.config.privacy import SecureAggregation
from jaxdist.federated.secure_aggregation import shares
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.client import Client, Identity
from jaxdist.federated.secure_aggregation.graph import degree_for
from jaxdist.federated.secure_aggregation.in_one_process import answer, secure_sum
from jaxdist.federated.secure_aggregation.masks import keystream
from jaxdist.federated.secure_aggregation.messages import Agreed, Agreements, Masked, Message, Share, Survivors
from jaxdist.federated.secure_aggregation.rules import ProtocolError, Rules, TooFewClients
from jaxdist.federated.secure_aggregation.server import Server
from jaxdist.transport.plain import from_plain, to_plain

LENGTH = 11
FIVE = Rules(num_clients=5, threshold=3, degree=4, length=LENGTH)
ROUND = b"run 7, round 3"
PHASES = ("keys", "shares", "vectors", "reveal")


def vectors(num_clients: int, dtype: str = "uint32") -> dict[int, np.ndarray]:
    draw = np.random.default_rng(0)
    return {i: draw.integers(0, np.iinfo(dtype).max, LENGTH, dtype, endpoint=True) for i in range(num_clients)}


def plain_sum(of: dict[int, np.ndarray], clients) -> np.ndarray:
    """In Python's integers, without a modulus until the end."""
    words = [sum(int(of[one][k]) for one in clients) for k in range(LENGTH)]
    dtype = next(iter(of.values())).dtype
    return np.array([word % 2 ** (8 * dtype.itemsize) for word in words], dtype)


class Drawn:
    """Octets that look random and are the same in every run."""

    def __init__(self, seed: int):
        self.seed, self.count = seed, 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(f"{self.seed} {self.count}".encode()).digest(size)


class Round:
    """A round of five up to some phase, to be interfered with."""

    def __init__(self, rules: Rules = FIVE, identities=None, round_id: bytes = ROUND, seed: int = 1):
        entropy = Drawn(seed)
        self.clients = {
            i: Client(rules, round_id, i, identity=identities and identities[i], entropy=entropy)
            for i in range(rules.num_clients)
        }
        self.server = Server(rules, round_id, self.clients.keys(), signs=bool(identities), entropy=entropy)
        self.vectors = vectors(rules.num_clients)
        self.asked = dict.fromkeys(self.clients)

    def until(self, phase: str, lost=()) -> dict:
        """What the server says to each client at the beginning of `phase`."""
        while self.server.phase != phase:
            for one, message in self.asked.items():
                if one not in lost:
                    self.server.receive(one, answer(self.clients[one], message, self.vectors[one]))
            self.asked = self.server.advance()
        return self.asked


# The sum.


def test_the_sum_is_the_plain_sum_for_every_set_that_may_drop_at_every_phase():
    """All 181 ways in which at most two of five say nothing more from some phase on."""
    given = vectors(5)
    for num_lost in (0, 1, 2):
        for who in itertools.combinations(range(5), num_lost):
            for when in itertools.product(PHASES, repeat=num_lost):
                lost = dict(zip(who, when, strict=True))
                total = secure_sum(FIVE, ROUND, given, lost)
                assert total.clients == tuple(i for i in range(5) if lost.get(i, "reveal") == "reveal")
                np.testing.assert_array_equal(total.total, plain_sum(given, total.clients), str(lost))


def test_there_is_no_sum_when_more_drop_whenever_they_do():
    given = vectors(5)
    for number, when in enumerate(itertools.product(PHASES, repeat=3)):
        who = list(itertools.combinations(range(5), 3))[number % 10]
        with pytest.raises(TooFewClients, match="missing") as raised:
            secure_sum(FIVE, ROUND, given, dict(zip(who, when, strict=True)))
        assert raised.value.missing >= 1


@pytest.mark.parametrize("bits", [32, 64])
def test_twenty_clients_with_eight_neighbours_each(bits):
    rules = Rules(num_clients=20, threshold=5, degree=8, length=LENGTH, word_bits=bits)
    given, draw, sums = vectors(20, rules.dtype), np.random.default_rng(bits), 0
    for attempt in range(8):
        lost = {int(i): str(draw.choice(PHASES)) for i in draw.choice(20, attempt, replace=False)}
        try:
            total = secure_sum(rules, ROUND, given, lost)
        except TooFewClients:
            continue  # of some client too many neighbours were among those lost
        sums += 1
        np.testing.assert_array_equal(total.total, plain_sum(given, total.clients))
    assert sums >= 4


def test_a_round_with_identities_has_the_same_sum():
    given = vectors(5)
    rules = dataclasses.replace(FIVE, threshold=4)
    total = secure_sum(rules, ROUND, given, {2: "vectors"}, identities=identities())
    np.testing.assert_array_equal(total.total, plain_sum(given, (0, 1, 3, 4)))
    with pytest.raises(TooFewClients, match="agreement"):
        secure_sum(rules, ROUND, given, {1: "agreement", 2: "agreement"}, identities=identities())


def test_late_doubled_and_foreign_messages_count_nothing():
    play = Round()
    first = play.clients[0].advertise()
    assert play.server.receive(0, first)
    assert not play.server.receive(0, first)
    assert not play.server.receive(1, Client(FIVE, b"another round", 1).advertise())
    play.until("shares", lost=[4])
    assert not play.server.receive(4, play.clients[4].advertise())
    assert play.server.waiting_for == {0, 1, 2, 3}


def test_the_sum_is_right_or_not_there_when_shares_come_after_it_was_tried():
    """Masks that came off in an attempt must not come off again in the next."""
    rules = Rules(num_clients=20, threshold=5, degree=8, length=LENGTH)
    play = Round(rules)
    late = [one.client for one in play.until("shares")[7].neighbours][:6]  # of 7's nine holders three answer in time
    asked = play.until("reveal")
    said = {one: answer(play.clients[one], message, play.vectors[one]) for one, message in asked.items()}
    for one in set(said) - set(late):
        assert play.server.receive(one, said[one])
    refused = 0
    while play.server.result is None:
        try:
            play.server.advance()
        except TooFewClients:
            assert play.server.receive(late[refused], said[late[refused]])
            refused += 1
    assert refused >= 2
    np.testing.assert_array_equal(play.server.result.total, plain_sum(play.vectors, range(20)))
    with pytest.raises(ProtocolError, match="the round is over"):
        play.server.advance()


# What the server sees.


def test_a_masked_vector_looks_uniform_whatever_is_in_it():
    rules = dataclasses.replace(FIVE, length=50_000)
    for value in (0, 1, 2**32 - 1):
        play = Round(rules, seed=value)
        play.vectors = dict.fromkeys(range(5), np.full(rules.length, value, np.uint32))
        seen = answer(play.clients[2], play.until("vectors")[2], play.vectors[2]).vector
        counts = np.bincount(seen.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
        ones = np.unpackbits(seen.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(32 * rules.length)


def test_two_masked_vectors_differ_by_more_than_their_vectors():
    """With pairwise masks alone the sum of all, and with own masks alone nothing but the seeds, would hide them."""
    play = Round()
    play.vectors = dict.fromkeys(range(5), np.zeros(LENGTH, np.uint32))
    seen = [answer(play.clients[i], message, play.vectors[i]).vector for i, message in play.until("vectors").items()]
    assert len({one.tobytes() for one in seen}) == 5
    assert np.add.reduce(seen).any()  # own masks are still on the sum


def test_keys_and_masks_are_fresh_in_every_round():
    rounds = [Client(FIVE, ROUND, 0).advertise() for _ in range(2)]
    public = {key for one in rounds for key in (one.mask_key, one.share_key)}
    assert len(public) == 4
    same_keys = [Round(round_id=name) for name in (b"round 1", b"round 2")]  # even if entropy repeated itself
    seen = [answer(play.clients[0], play.until("vectors")[0], play.vectors[0]).vector for play in same_keys]
    assert (seen[0] != seen[1]).any()


def test_no_secret_comes_from_a_generator_that_can_be_foreseen():
    for path in Path(package.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {alias.name for node in imports for alias in node.names}
        imported |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        assert not [name for name in imported if {"random", "default_rng"} & set(name.split("."))], path.name
        drawn = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "random"]
        assert not drawn or path.name == "quantise.py", path.name  # rounding is no secret


def test_a_keystream_is_chacha20():
    """RFC 8439, appendix A.1, test vector 1: key, nonce and counter zero."""
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert keystream(bytes(32), 8, "uint32").tobytes() == expected
    long = keystream(b"k" * 32, 300_001, "uint32")  # over several chunks
    np.testing.assert_array_equal(long[:1000], keystream(b"k" * 32, 1000, "uint32"))
    assert len(np.unique(long)) > 299_900


# Those who do not keep to the protocol.


def test_a_client_never_gives_both_shares_of_the_same_neighbour():
    play = Round()
    first = play.until("reveal")[0]
    assert first.clients == (0, 1, 2, 3, 4)
    said = play.clients[0].survivors(first)
    assert {one.owner for one in said.seeds} == {0, 1, 2, 3, 4}
    assert not said.keys
    assert play.clients[0].survivors(first) == said  # a message that came twice
    with pytest.raises(ProtocolError, match="different Survivors"):
        play.clients[0].survivors(dataclasses.replace(first, clients=(0, 1, 2, 3)))


def test_a_client_that_was_told_two_things_says_nothing_more():
    play = Round()
    forwarded = play.until("vectors")[0]
    play.clients[0].mask(forwarded, play.vectors[0])
    with pytest.raises(ProtocolError, match="different Forwarded"):
        play.clients[0].mask(dataclasses.replace(forwarded, sealed=forwarded.sealed[1:]), play.vectors[0])
    for message in (forwarded, Survivors(ROUND, (0, 1, 2, 3, 4))):
        with pytest.raises(ProtocolError, match="nothing more is said"):
            answer(play.clients[0], message, play.vectors[0])


def test_nobody_speaks_for_another():
    play = Round()
    with pytest.raises(ProtocolError, match="client 1 speaks for another"):
        play.server.receive(1, play.clients[0].advertise())
    assert play.server.waiting_for == {0, 1, 2, 3, 4}


def test_for_each_owner_a_client_gives_exactly_one_share():
    play = Round()
    said = play.clients[1].survivors(play.until("reveal", lost=[])[1])
    other = Round()
    other.until("vectors")
    for i in (0, 1, 3, 4):
        other.server.receive(i, answer(other.clients[i], other.asked[i], other.vectors[i]))
    dropped = other.clients[1].survivors(other.server.advance()[1])
    assert [one.owner for one in dropped.seeds] == [0, 1, 3, 4]
    assert [one.owner for one in dropped.keys] == [2]
    assert said.seeds != dropped.seeds


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        ((1, 2, 3, 4), "with this client on it"),
        ((0, 1), "1 missing"),
        ((0, 1, 1, 2), "ascending"),
        ((0, 1, 2, 9), "of the roster"),
    ],
)
def test_a_client_refuses_survivors_that_an_honest_server_would_not_name(survivors, reason):
    play = Round()
    play.until("reveal")
    with pytest.raises(ProtocolError, match=reason):
        play.clients[0].survivors(Survivors(ROUND, survivors))


def test_a_client_that_dropped_early_cannot_survive():
    play = Round()
    play.until("vectors", lost=[])
    forwarded = play.asked[0]
    without_4 = dataclasses.replace(forwarded, sealed=forwarded.sealed[:-1])
    play.clients[0].mask(without_4, play.vectors[0])
    with pytest.raises(ProtocolError, match=r"\[4\] are said to survive"):
        play.clients[0].survivors(Survivors(ROUND, (0, 1, 2, 3, 4)))


def test_a_client_gives_nothing_when_too_few_of_its_own_neighbours_survive():
    rules = Rules(num_clients=20, threshold=5, degree=8, length=LENGTH)
    play = Round(rules)
    known = {one.client for one in play.until("shares")[0].neighbours}
    play.until("reveal")
    strangers = sorted(set(range(20)) - known)  # 12 with itself: enough in all
    with pytest.raises(TooFewClients, match="holders that survive: 1 of the 5"):
        play.clients[0].survivors(Survivors(ROUND, tuple(strangers)))


def test_shares_that_were_altered_forged_swapped_or_replayed_are_refused():
    play, earlier = Round(), Round(round_id=b"run 7, round 2")
    forwarded, old = play.until("vectors")[0], earlier.until("vectors")[0]
    first, second, *rest = forwarded.sealed
    flipped = bytes([first.text[0] ^ 1]) + first.text[1:]
    for text in (flipped, second.text, old.sealed[0].text, first.text[:-1], b"", bytes(len(first.text))):
        wrong = dataclasses.replace(forwarded, sealed=(dataclasses.replace(first, text=text), second, *rest))
        with pytest.raises(ProtocolError, match="forged, altered"):
            play.clients[0].mask(wrong, play.vectors[0])
    with pytest.raises(ProtocolError, match="another round"):
        play.clients[0].mask(old, play.vectors[0])
    with pytest.raises(ProtocolError, match="one each"):
        play.clients[0].mask(dataclasses.replace(forwarded, sealed=(first, first)), play.vectors[0])
    with pytest.raises(TooFewClients):
        play.clients[0].mask(dataclasses.replace(forwarded, sealed=(first,)), play.vectors[0])


@pytest.mark.parametrize("which", ["seeds", "keys"])
def test_a_share_that_is_revealed_wrongly_costs_the_sum_but_is_noticed(which):
    play = Round()
    play.until("vectors")
    for i in (0, 1, 2, 3):
        play.server.receive(i, answer(play.clients[i], play.asked[i], play.vectors[i]))
    for i, message in play.server.advance().items():
        said = play.clients[i].survivors(message)
        if i == 0:
            false = tuple(Share(one.owner, bytes(32)) for one in getattr(said, which))
            said = dataclasses.replace(said, **{which: false})
        play.server.receive(i, said)
    with pytest.raises(ProtocolError, match="altered: there is no sum"):
        play.server.advance()
    with pytest.raises(ProtocolError, match="the round is over"):
        play.server.advance()
    assert play.server.result is None


def test_a_roster_is_checked():
    play = Round()
    roster = play.until("shares")[0]
    short = (0, 1)
    bad = [
        (dataclasses.replace(roster, clients=short, neighbours=roster.neighbours[:1]), "missing"),
        (dataclasses.replace(roster, clients=(1, 2, 3, 4)), "this client"),
        (dataclasses.replace(roster, clients=(0, 1, 2, 3, 4, 5)), "a round of 5"),
        (dataclasses.replace(roster, graph_seed=b"short"), "not 5"),
        (dataclasses.replace(roster, neighbours=roster.neighbours[:2]), "neighbours in the graph"),
        (dataclasses.replace(roster, neighbours=(roster.neighbours[0],) * 4), "neighbours in the graph"),
        (
            dataclasses.replace(
                roster,
                neighbours=(dataclasses.replace(roster.neighbours[1], client=1), *roster.neighbours[1:]),
            ),
            "the same",
        ),
    ]
    for wrong, reason in bad:
        with pytest.raises(ProtocolError, match=reason):
            play.clients[0].share(wrong)


def test_a_public_key_with_which_everybody_could_foresee_the_agreement_is_refused():
    play = Round()
    weak = dataclasses.replace(play.clients[0].advertise(), mask_key=bytes(32))
    with pytest.raises(ProtocolError, match="no public key"):
        play.server.receive(0, weak)
    roster = play.until("shares")[0]
    weak = (dataclasses.replace(roster.neighbours[0], share_key=bytes(32)), *roster.neighbours[1:])
    with pytest.raises(ProtocolError, match="no public key"):
        play.clients[0].share(dataclasses.replace(roster, neighbours=weak))


def test_messages_out_of_order_are_refused():
    play = Round()
    with pytest.raises(ProtocolError, match="Survivors before Forwarded"):
        play.clients[0].survivors(Survivors(ROUND, (0, 1, 2)))
    with pytest.raises(ValueError, match="uint32"):
        play.clients[0].mask(play.until("vectors")[0], np.zeros(3))


# A server that lies, and clients with identities.


def identities() -> dict[int, Identity]:
    own = {i: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(5)}
    public = {i: key.public_key() for i, key in own.items()}
    return {i: Identity(key, public) for i, key in own.items()}


def test_keys_that_the_server_puts_in_place_of_a_clients_are_refused():
    play = Round(identities=identities())
    roster = play.until("shares")[0]
    servers_own = dataclasses.replace(Client(FIVE, ROUND, 1).advertise(), signature=roster.neighbours[0].signature)
    with pytest.raises(ProtocolError, match="client 1: the signature is wrong"):
        play.clients[0].share(dataclasses.replace(roster, neighbours=(servers_own, *roster.neighbours[1:])))


def test_clients_that_are_shown_different_survivors_reveal_nothing():
    """The attack: some are told that 4 survives, others that it dropped; together they have both its shares."""
    play = Round(identities=identities())
    play.until("agreement")
    lies = {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4), 2: (0, 1, 2, 3), 3: (0, 1, 2, 3)}
    signed = {i: play.clients[i].survivors(Survivors(ROUND, lie)) for i, lie in lies.items()}
    assert all(isinstance(one, Agreed) for one in signed.values())
    with pytest.raises(ProtocolError, match="signature is wrong"):
        play.clients[0].reveal(Agreements(ROUND, (signed[0], signed[1], signed[2])))
    with pytest.raises(TooFewClients, match="agree"):
        play.clients[0].reveal(Agreements(ROUND, (signed[0], signed[1])))
    with pytest.raises(ProtocolError, match="one each"):
        play.clients[0].reveal(Agreements(ROUND, (signed[0], signed[1], signed[1])))


def test_identities_and_neighbours_that_the_server_chooses_do_not_go_together():
    with pytest.raises(ProtocolError, match="all clients are neighbours"):
        Client(Rules(20, 5, 8, LENGTH), ROUND, 0, identity=identities()[0])


# The parts.


@pytest.mark.parametrize(("threshold", "count"), [(2, 3), (3, 5), (5, 9)])
def test_exactly_the_threshold_of_shares_gives_the_secret(threshold, count):
    secret = bytes(range(32))
    split = list(enumerate(shares.split(secret, threshold, count)))
    for chosen in itertools.islice(itertools.combinations(split, threshold), 10):
        assert shares.combine(chosen) == secret
    assert shares.combine(split[: threshold - 1]) != secret


@pytest.mark.parametrize(
    "numbers",
    [(2, 2, 1), (5, 2, 4), (5, 6, 4), (5, 3, 5), (20, 5, 7), (5, 3, 1)],
    ids=["two clients", "half", "all and one", "more neighbours", "odd", "one neighbour"],
)
def test_rules_that_make_no_round_are_refused(numbers):
    with pytest.raises(UserError):
        Rules(*numbers, length=LENGTH)


def test_the_config_becomes_rules_and_a_quantiser():
    rules, quantiser = build_secure_aggregation(SecureAggregation(), num_clients=10, size=99)
    assert (rules.degree, rules.threshold, rules.min_clients, rules.length, rules.dtype) == (9, 7, 7, 100, "uint32")
    assert quantiser.max_weight == 1
    rules, _ = build_secure_aggregation(SecureAggregation(max_weight=60_000), num_clients=100, size=99)
    assert rules.degree == degree_for(100, 2 / 3) < 99
    assert rules.word_bits == 64


# On the wire.


def over_the_wire(message: Any) -> Any:
    header = json.loads(json.dumps(to_plain(message)))
    return from_plain(header, getattr(message, "arrays", ()), of=Message)


def test_every_message_survives_the_wire():
    play, seen = Round(identities=identities()), {}
    while play.server.result is None:
        for one, message in play.asked.items():
            said = answer(play.clients[one], message, play.vectors[one])
            seen[type(said).__name__] = True
            assert play.server.receive(one, over_the_wire(said))
        play.asked = play.server.advance()
        for one, message in play.asked.items():
            seen[type(message).__name__] = True
            assert over_the_wire(message) == message
            play.asked[one] = over_the_wire(message)
    assert seen.keys() == Message.kinds.keys()
    np.testing.assert_array_equal(play.server.result.total, plain_sum(play.vectors, range(5)))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Hello"},
        {"client": "0"},
        {"client": True},
        {"mask_key": "no base64!"},
        {"mask_key": 5},
        {"surplus": 1},
    ],
)
def test_what_is_no_message_is_refused(change):
    header = to_plain(Client(FIVE, ROUND, 0).advertise())
    with pytest.raises(ValueError):  # noqa: PT011 (of plain messages in general)
        from_plain({**header, **change}, of=Message)
    with pytest.raises(ValueError, match="has no arrays"):
        from_plain(header, (np.zeros(3),), of=Message)
    with pytest.raises(ValueError, match="2 arrays for one vector"):
        from_plain(to_plain(Masked(ROUND, 0, (np.zeros(3),))), (np.zeros(3),) * 2, of=Message)
