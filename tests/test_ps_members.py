"""What the protocol promises of those that come and go, and of what was lost on the way, one claim at a time."""

from typing import Any

import pytest
from ps_world import World, applied_positions, check_sums, rules

from jaxdist.parameter_server.contracts import Rules, Save
from jaxdist.parameter_server.messages import (
    Entries,
    Push,
    Replicate,
    Taken,
    Training,
    Transfer,
    Transferred,
    ViewIs,
)


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_a_worker_that_leaves_gives_back_its_samples_at_once_and_disturbs_nobody(mode: str):
    """It has pushed to one shard, and not to the other yet."""
    world = World(rules(mode=mode, num_shards=2, num_workers=3, budget_versions=30)).run(until=3.5)
    world.loses = lambda sender, to, message: (sender, to) == ("worker-0", "server-1") and isinstance(message, Push)
    world.run(until=4.4)
    world.call("worker-0", "leave")
    world.run(until=4.5)
    assert world.ended["worker-0"].code == 0
    (left,) = (fields for fields in world.noted("membership") if not fields["joined"])
    assert (left["worker"], left["reason"]) == ("worker-0", "left")
    assert not any(world.machines[f"server-{i}"].primary.replica.held for i in (0, 1))
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert {fields["reason"] for fields in world.noted("membership") if not fields["joined"]} == {"left", "finished"}
    begun = [now for now, name, _ in world.started if name == "worker-1" and now > 4.4]
    assert all(later - now < 1.03 for now, later in zip(begun, begun[1:], strict=False)), "it was waited for"
    ledger = world.commits[30].meta["ledger"]
    assert applied_positions(world) == list(range(ledger["applied"]))
    assert [row[:4] for row in world.primary(0).history] == [row[:4] for row in world.primary(1).history]
    check_sums(world)


def test_when_the_last_worker_has_left_the_run_waits_for_another():
    world = World(rules(num_workers=1, budget_versions=10)).run(until=4.5)
    world.call("worker-0", "leave")
    world.run(until=20.0)
    assert [*world.ended] == ["worker-0"]
    assert world.primary().version == 4
    del world.ended["worker-0"]
    world.start("worker-0")
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert {row[2] for row in world.primary().history} == {1, 2}
    assert world.primary().value == -sum(range(1, 31))


@pytest.mark.parametrize("durability", ["replay", "memory", "backup"])
def test_a_worker_leaves_while_the_lead_is_replaced_though_it_is_not_told_of_it(durability: str):
    plan = rules(durability=durability, num_workers=2, budget_versions=30)
    world = World(plan, num_servers=2 if durability == "backup" else 1).run(until=4.5)
    world.kill("server-0")
    world.call("worker-0", "leave")
    world.loses = lambda sender, to, message: to == "worker-0" and world.now < 9.0
    if durability != "backup":
        world.start("server-0")
    world.run(until=8.9)
    assert not world.ended, "gone before its samples were anybody's"
    world.run(until=10.5)
    assert world.ended["worker-0"].code == 0
    assert world.view.number > 1
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert applied_positions(world) == list(range(90))
    check_sums(world)


def test_a_worker_that_is_told_to_leave_before_it_has_joined_was_never_there():
    world = World(rules(num_workers=2))
    world.call("worker-0", "leave")
    world.run()
    assert world.ended["worker-0"].code == 0
    assert {row[1] for row in world.primary().history} == {"worker-1"}
    assert {fields["worker"] for fields in world.noted("membership")} == {"worker-1"}


def test_a_decided_push_that_comes_again_is_known_and_held_nowhere():
    world = World(rules(num_shards=2, budget_versions=30)).run(until=6.5)
    applied = world.primary().version
    old = [(to, m) for name, to, m in world.said if name == "worker-0" and isinstance(m, Push) and m.seq == 2]
    for server, push in old:
        world.call(server, "receive", "worker-0", push)
        sender, to, answer = world.said[-1]
        assert (sender, to, answer) == (server, "worker-0", Taken(1, 1, push.shard, 2))
        assert not world.machines[server].primary.replica.held
    lead = world.machines["server-0"].primary.lead
    assert (lead.counts["duplicate"], world.primary().version) == (1, applied)


@pytest.mark.parametrize("kind", [Entries, Replicate])
def test_a_backup_that_lacks_part_of_what_was_said_without_it_is_not_ready(kind: type):
    """It would take over, and a push of which its worker was told that it is applied would be lost."""
    plan = rules(durability="backup", budget_versions=40, replay_window=50)
    world = World(plan, num_servers=2).run(until=4.5)
    world.kill("server-1")
    world.loses = lambda sender, to, message: to == "server-1" and isinstance(message, Transfer)
    world.start("server-1")
    before = world.primary().version
    world.run(until=8.0)
    assert world.primary().version > before, "training does not wait for a backup that has nothing"
    world.loses = lambda sender, to, message: to == "server-1" and isinstance(message, kind)
    world.run(until=14.0)
    assert any(isinstance(message, Transferred) for _, _, message in world.said[-200:])
    assert not world.view.shards[0].ready
    world.loses = lambda sender, to, message: False
    world.run(until=20.0)
    assert world.view.shards[0].ready
    world.kill("server-0")
    before = world.primary().history
    world.run(until=60.0)
    assert (world.view.epoch, world.view.shards[0].primary) == (1, "server-1")
    assert world.primary().history[: len(before)] == before
    assert world.primary().version == 40
    check_sums(world)


def test_what_a_lead_decides_that_the_coordinator_has_given_up_is_never_durable():
    """It is a zombie that all others hear, until they learn of the new epoch; then it is believed no more."""
    world = World(rules(num_shards=2, budget_versions=40, replay_window=50, cut_every=6), num_servers=3).run(
        until=5.5
    )
    world.loses = lambda sender, to, message: (
        {sender, to} == {"coordinator", "server-0"} or (sender == "coordinator" and isinstance(message, ViewIs))
    )
    world.run(until=9.0)
    old = world.machines["server-0"].primary.lead
    assert (world.view.epoch, world.view.shards[0].primary, old.view.epoch) == (2, "server-2", 1)
    assert old.stable.version > 13, "the workers do not know of the new epoch, and go on with the old one"
    assert [*world.commits] == [6]
    world.loses = lambda sender, to, message: False
    world.run()
    assert [fields["cut"] for fields in world.noted("rollback")] == [6]
    assert {end.code for end in world.ended.values()} == {0}
    assert world.primary(0).version == world.primary(1).version == 40
    check_sums(world)


@pytest.mark.parametrize("durability", ["replay", "memory"])
def test_messages_of_an_epoch_that_is_over_change_nothing(durability: str):
    """Between the same nodes, as a network may deliver them late."""
    histories = []
    for late in (False, True):
        plan = rules(durability=durability, num_shards=2, num_workers=3, budget_versions=40, replay_window=50)
        world = World(plan).run(until=6.3)
        world.kill("server-1")
        world.start("server-1")
        world.run(until=6.9)
        assert {server.view.epoch for server in world.machines.values() if hasattr(server, "view")} == {2}
        for sender, to, message in world.said[:] if late else ():
            if isinstance(message, Training) and message.epoch == 1:
                world.call(to, "receive", sender, message)
        world.run()
        check_sums(world)
        histories.append(world.primary().history)
    assert histories[0] == histories[1]


class SlowDisk(World):
    """What is saved is not on disk before `write` says so, or `slow` is over."""

    def __init__(self, rules: Rules):
        self.slow, self.saves = True, []
        super().__init__(rules)

    def _carry_out(self, name: str, effect: Any) -> None:
        if isinstance(effect, Save) and self.slow:
            self.saves.append((name, effect))
        else:
            super()._carry_out(name, effect)

    def write(self, name: str, which: int) -> None:
        super()._carry_out(name, [effect for server, effect in self.saves if server == name][which])


def test_what_was_saved_of_an_epoch_that_is_over_is_no_part_of_the_next_ones_checkpoint():
    """Of the same version, and of another history."""
    world = SlowDisk(rules(num_shards=2, budget_versions=30, replay_window=50)).run(until=3.5)
    assert [(name, effect.version) for name, effect in world.saves] == [("server-0", 4), ("server-1", 4)]
    world.kill("server-0")
    world.start("server-0")
    world.run(until=7.5)
    assert [(name, effect.version) for name, effect in world.saves[2:]] == [("server-0", 4), ("server-1", 4)]
    world.write("server-1", 0)
    world.write("server-0", 1)
    world.run(until=9.5)
    assert not world.commits
    world.write("server-1", 1)
    world.run(until=11.5)
    assert [world.parts[about["part"]] for about in world.commits[4].parts] == [
        effect.captured for _, effect in world.saves[2:4]
    ]
    world.slow = False
    for name in ("server-0", "server-1"):
        world.write(name, -1)
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    check_sums(world)


def test_pushes_are_kept_until_the_checkpoint_that_holds_them_is_committed():
    """It was begun when a shard is lost: nothing that came after the one before is computed again."""
    world = SlowDisk(rules(num_shards=2, budget_versions=30, replay_window=50))
    world.slow = False
    world.run(until=3.5)
    world.slow = True
    world.run(until=6.5)
    assert [*world.commits] == [4]
    assert world.primary().version > world.saves[0][1].version == 8
    world.kill("server-1")
    world.start("server-1")
    world.slow = False
    world.run()
    assert [fields["cut"] for fields in world.noted("rollback")] == [4]
    ranges = [work.ranges for _, _, work in world.started]
    assert len(set(ranges)) == len(ranges)
    check_sums(world)
