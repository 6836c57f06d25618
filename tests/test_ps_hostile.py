"""Whoever is let in but has no part in a job cannot disturb it, whatever it says."""

import dataclasses
import random
import types
import typing

import numpy as np
import pytest
from ps_world import World, rules

from jaxdist.parameter_server import entries
from jaxdist.parameter_server.messages import Entry, ViewIs, from_plain, to_plain
from jaxdist.parameter_server.plain import KINDS, Message

NAMES = ["worker-0", "worker-1", "server-0", "server-1", "coordinator", "mallory", ""]
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
    message = anything(draws.choice([kind for kind in KINDS.values() if kind not in ENTRIES]), draws)
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
            sender = draws.choice(["mallory", "server-77"])
            if to in world.machines and not (sender == "server-77" and isinstance(message, ViewIs)):
                world.call(to, "receive", sender, message)
    world.run()
    assert world.primary(0).history == undisturbed.primary(0).history
    assert world.primary(1).value == undisturbed.primary(1).value
    assert {end.code for end in world.ended.values()} == {0}
