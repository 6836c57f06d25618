"""Whoever is let in but has no part in a job cannot disturb it, whatever it says."""

import dataclasses
import ipaddress
import random
import types
import typing

import numpy as np
import pytest
from ps_world import World, rules

from jaxdist.cluster.doctor.facts import interfaces
from jaxdist.config.transport import Transport
from jaxdist.parameter_server import entries
from jaxdist.parameter_server.contracts import Effect, End, Send
from jaxdist.parameter_server.messages import (
    Bye,
    Entry,
    Hello,
    Pull,
    PullReply,
    Push,
    Replicate,
    Transfer,
    View,
    ViewIs,
    Welcome,
    from_plain,
    to_plain,
)
from jaxdist.parameter_server.node import Node
from jaxdist.parameter_server.traffic import Traffic, totals
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint
from jaxdist.transport.plain import Message
from jaxdist.transport.rendezvous import parse, reachable

NAMES = ["worker-0", "worker-1", "server-0", "server-1", "coordinator", "mallory", ""]
WITH_TENSORS = (Push, Pull, PullReply, Replicate, Transfer)
ENTRIES = [kind for kind in vars(entries).values() if isinstance(kind, type) and Entry in kind.__bases__]


def anything(wanted: object, draws: random.Random) -> object:
    """Of the type that a field is annotated with; numbers that are likely to mean something, or absurd."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return anything(draws.choice(arguments), draws)
    if origin is tuple:
        each = [arguments[0]] * draws.randrange(3) if arguments[-1] is Ellipsis else arguments
        return tuple(anything(one, draws) for one in each)
    if origin is dict:
        return {draws.choice(NAMES): anything(arguments[1], draws) for _ in range(draws.randrange(3))}
    if wanted is Entry:
        return anything(draws.choice(ENTRIES), draws)
    if dataclasses.is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        return wanted(**{field.name: anything(hints[field.name], draws) for field in dataclasses.fields(wanted)})
    if wanted is np.ndarray:
        return np.zeros(draws.randrange(3))
    values = {
        int: [-1, 0, 1, 1, 1, 2, 3, 10**18],
        float: [0.0, -1.0, float("nan")],
        str: NAMES,
        bool: [True, False],
        type(None): [None],
    }
    return draws.choice(values.get(wanted, [0]))


def random_message(draws: random.Random) -> Message:
    """As it comes off the wire."""
    message = anything(draws.choice([kind for kind in Message.kinds.values() if kind not in ENTRIES]), draws)
    return from_plain(to_plain(message), getattr(message, "arrays", ()))


@pytest.mark.parametrize("seed", range(10))
def test_what_a_stranger_says_changes_nothing(seed: int):
    draws = random.Random(seed)
    plan = rules(num_shards=2, durability=["replay", "backup"][seed % 2], budget_versions=12)
    undisturbed = World(plan, num_servers=4).run()
    world = World(plan, num_servers=4)
    for tenths in range(150):
        world.run(until=tenths / 10)
        for _ in range(20):
            message, to = random_message(draws), draws.choice(world.names)
            if to in world.machines:
                world.call(to, "receive", draws.choice(["mallory", "server-77"]), message)
    world.run()
    assert world.primary(0).history == undisturbed.primary(0).history
    assert world.primary(1).value == undisturbed.primary(1).value
    assert {end.code for end in world.ended.values()} == {0}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("member", ["worker-0", "server-1"])
def test_a_member_that_lies_ends_nobody(member: str, seed: int):
    """It may spoil what it has a part in, but no other process breaks; a worker that lies spoils no shard."""
    draws = random.Random(seed)
    plan = rules(num_shards=2, num_workers=3, durability=["replay", "backup"][seed % 2], budget_versions=12)
    world = World(plan, num_servers=4)
    for tenths in range(80):
        world.run(until=tenths / 10)
        for _ in range(20):
            message, to = random_message(draws), draws.choice([name for name in world.names if name != member])
            # Nodes refuse tensors that do not fit; of what fits, a worker may push what it likes.
            if to in world.machines and not isinstance(message, WITH_TENSORS):
                world.call(to, "receive", member, message)
    if member == "worker-0":
        world.run()
        assert {end.code for name, end in world.ended.items() if name != member} == {0}
        assert world.primary(0).version == world.primary(1).version == 12
        assert world.primary(0).value == world.primary(1).value


def test_a_machine_that_fails_is_busy_no_more():
    """Else what beats for one that is at work would keep its lease for ever."""
    node = Node(Listener("server-0", byes=1), endpoint("server-0"), {})
    with pytest.raises(ZeroDivisionError):
        node.call(lambda now: [1 // 0])
    assert node.busy_since is None
    node.close(linger=0.0)


# What comes off the wire

BEAT = {"kind": "Beat", "incarnation": 1, "view": 1}
TRAFFIC = {"kind": "Traffic", "nonce": "x", "sent": {}, "received": {}, "cpu_seconds": 1, "refused": 0}
NO_MESSAGES = {
    "a kind that is a list": {"kind": []},
    "a kind that is a mapping": {"kind": {}},
    "an unknown kind": {"kind": "x" * 1000},
    "no kind": {},
    "a field too many": {**BEAT, "more": 1},
    "a field too few": {"kind": "Beat", "view": 1},
    "a boolean for a number": {**BEAT, "view": True},
    "a number of many digits": {**BEAT, "view": 10**400},
    "a fraction of many digits": {**TRAFFIC, "cpu_seconds": 10**400},
    "a list for a mapping": {**TRAFFIC, "sent": []},
    "numbers for names": {**TRAFFIC, "nonce": 1},
    "an address that is none": {"kind": "Hello", "nonce": "x", "address": "x"},
    "an address beyond this machine": {"kind": "Hello", "nonce": "x", "address": "192.0.2.77:1"},
    "an address that no name may be": {"kind": "Hello", "nonce": "x", "address": "..:1"},
    "a port of many digits": {"kind": "Hello", "nonce": "x", "address": f"127.0.0.1:{'9' * 5000}"},
    "a port that is none": {"kind": "Hello", "nonce": "x", "address": "127.0.0.1:65536"},
}


class Listener:
    """A machine that hears everything and ends when enough have said Bye; then it tells a server so."""

    def __init__(self, name: str, byes: int):
        self.name, self.byes = name, byes
        self.heard: list[tuple[str, Message]] = []

    def start(self, now: float) -> list[Effect]:
        return []

    def wake(self, timer: str, now: float) -> list[Effect]:
        return []

    def receive(self, sender: str, message: Message, now: float) -> list[Effect]:
        self.heard.append((sender, message))
        said = sum(isinstance(message, Bye) for _, message in self.heard)
        return [Send("server-1", Bye()), End(0, "")] if said == self.byes else []


def endpoint(name: str) -> Endpoint:
    return Endpoint(name, Credentials(b"a token that nobody guesses"))


def at(end: Endpoint) -> str:
    return "{}:{}".format(*end.address)


def test_what_is_no_message_is_refused_and_the_node_goes_on():
    node = Node(Listener("coordinator", byes=1), endpoint("coordinator"), {})
    with endpoint("worker-0") as worker:
        worker.connect("coordinator", node.endpoint.address)
        for plain in NO_MESSAGES.values():
            worker.send("coordinator", plain)
        worker.send("coordinator", to_plain(Hello("x", at(worker))))
        worker.send("coordinator", to_plain(Bye()))
        list(node.run())
    node.close(linger=0.0)
    assert [type(message) for _, message in node.machine.heard] == [Hello, Bye]
    assert node.refused == len(NO_MESSAGES)


def test_addresses_are_believed_of_the_coordinator_alone_and_never_an_older_one():
    """Whoever could say where others are could have their tensors sent to itself, or to nowhere."""
    node = Node(Listener("server-0", byes=2), endpoint("server-0"), {})
    with (
        endpoint("coordinator") as coordinator,
        endpoint("worker-0") as worker,
        endpoint("server-1") as server,
        endpoint("server-1") as trap,
    ):
        for sender in (coordinator, worker):
            sender.connect("server-0", node.endpoint.address)
        for number, where in ((2, trap), (3, server), (2, trap)):
            welcome = Welcome("", 1, View(number, 1, ()), {"server-1": at(where)})
            coordinator.send("server-0", to_plain(welcome))
            coordinator.send("server-0", to_plain(ViewIs(welcome.view, welcome.addresses)))
        worker.send("server-0", to_plain(ViewIs(View(9, 1, ()), {"server-1": at(trap)})))
        for sender in (coordinator, worker):
            sender.send("server-0", to_plain(Bye()))
        list(node.run())
        received = server.receive(20.0)
        assert received is not None
        assert received.header == {"kind": "Bye"}
    node.close()


@pytest.mark.parametrize(
    "address", ["", "x", ":1", "x:", "x:-1", "x:+1", "x:1.0", "x:\u0661", "x:65536", "x:" + "1" * 9999]
)
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match="not an address"):
        parse(address)


def test_an_address_may_be_of_ipv6():
    assert parse("[::1]:80") == ("::1", 80)
    assert reachable(("::1", 80), ("::1", 1)) == "[::1]:80"


@pytest.mark.parametrize("rendezvous", [("127.0.0.1", 1), ("localhost", 0), ("..", 1)])
def test_who_listens_everywhere_is_reached_from_other_hosts_though_the_coordinator_is_here(rendezvous):
    """On Debian a host's own name is 127.0.1.1."""
    host, port = parse(reachable(("0.0.0.0", 80), rendezvous))
    own = {about["address"] for about in interfaces().values() if about["address"]}
    assert port == 80
    assert host in own or (not own and ipaddress.ip_address(host).is_loopback)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("127.example.org", False)],
)
def test_a_name_that_looks_like_loopback_is_none(host, loopback):
    assert Transport.model_construct(host=host).is_loopback == loopback


def test_what_is_refused_is_counted_over_all_processes():
    of_two = [Traffic("a", {"x": 1}, {"y": 2}, 0.5, 3), Traffic("b", {"x": 4, "z": 5}, {}, 1.0, 6)]
    assert totals(of_two) == ({"x": 5, "z": 5}, {"y": 2}, 1.5, 9)
