"""What the protocol promises of those that come and go, and of what was lost on the way, one claim at a time."""

from dataclasses import replace
from typing import Any

import pytest
from ps_world import World, applied_positions, check_sums, rules

from jaxdist.parameter_server.contracts import Progress, Rules, Save
from jaxdist.parameter_server.messages import (
    Beat,
    Entries,
    Have,
    Part,
    Push,
    Replicate,
    Served,
    Staged,
    Taken,
    Training,
    Transfer,
    Transferred,
    View,
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
    world.run(until=7.0)
    assert [*world.ended] == ["worker-0"]
    assert world.primary().version == 4
    del world.ended["worker-0"]
    world.start("worker-0")
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert {row[2] for row in world.primary().history} == {1, 2}
    assert world.primary().value == -sum(range(1, 31))


def test_when_all_workers_have_left_and_none_comes_the_run_is_saved_to_go_on_later():
    world = World(rules(num_workers=2, budget_versions=10, cut_every=100)).run(until=4.5)
    for worker in ("worker-0", "worker-1"):
        world.call(worker, "leave")
    world.run()
    assert {name: end.code for name, end in world.ended.items()} == {
        **dict.fromkeys(("coordinator", "server-0"), 75),
        **dict.fromkeys(("worker-0", "worker-1"), 0),
    }
    assert world.noted("waiting")[0] == {"workers": []}
    assert world.noted("finished") == [{"code": 75, "reason": "no worker"}]
    again = World(rules(num_workers=2, budget_versions=10), earlier=world).run()
    assert {end.code for end in again.ended.values()} == {0}
    assert again.primary().value == -sum(range(1, 31))


def test_workers_that_were_lost_are_waited_for_and_the_wait_is_said():
    """Whoever started them starts them again."""
    world = World(rules(num_workers=2, budget_versions=10)).run(until=4.5)
    for worker in ("worker-0", "worker-1"):
        world.kill(worker)
    world.run(until=30.0)
    assert not world.ended
    assert world.noted("waiting")[:2] == [{"workers": ["worker-0", "worker-1"]}] * 2
    for worker in ("worker-0", "worker-1"):
        world.start(worker)
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert world.primary().value == -sum(range(1, 31))


def test_servers_that_do_not_come_are_named():
    world = World(rules(num_shards=2))
    world.silent = {"server-1"}
    world.run(until=4.0)
    assert world.noted("waiting") == [{"servers": ["server-1"]}]
    world.silent = set()
    world.run(until=6.5)
    world.kill("server-0")
    world.run(until=16.0)
    assert {"servers": ["server-0"]} in world.noted("waiting")
    world.start("server-0")
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    check_sums(world)


# Who is waited for at the beginning


@pytest.mark.parametrize("mode", ["bsp", "ksync", "async"])
def test_nothing_is_begun_before_all_workers_are_there(mode: str):
    """Real processes never come at the same time."""
    plan = rules(mode=mode, k=3 if mode == "ksync" else None, num_workers=3, budget_versions=9)
    undisturbed = World(plan).run()
    world = World(plan)
    world.silent = {"worker-2"}
    world.run(until=2.5)
    assert not world.started
    world.silent = set()
    world.run()
    assert world.primary().history == undisturbed.primary().history


def test_a_worker_that_does_not_come_is_waited_for_as_long_as_its_lease():
    world = World(rules(mode="bsp", num_workers=3))
    world.silent = {"worker-2"}
    world.run(until=2.9)
    assert not world.started
    world.run(until=4.0)
    assert {name for _, name, _ in world.started} == {"worker-0", "worker-1"}
    assert world.noted("waiting") == [{"workers": ["worker-2"]}]


def test_nothing_is_begun_by_a_lead_that_takes_over_before_all_workers_are_there():
    world = World(rules(mode="bsp", durability="backup", num_workers=3), num_servers=2)
    world.silent = {"worker-2"}
    world.run(until=1.0)
    assert world.view.shards[0].ready
    world.kill("server-0")
    world.run(until=5.0)
    assert world.view.shards[0].primary == "server-1"
    assert not world.started
    world.silent = set()
    world.run(until=60.0)
    assert [row[1] for row in world.primary().history] == ["worker-0", "worker-1", "worker-2"] * 8


@pytest.mark.parametrize("mode", ["async", "bsp"])
@pytest.mark.parametrize("resumed", [False, True])
def test_before_the_first_checkpoint_of_a_job_kept_pushes_are_applied_again_too(mode: str, resumed: bool):
    plan = rules(mode=mode, num_shards=2, num_workers=3, budget_versions=40, cut_every=39, replay_window=80)
    earlier = World(rules(mode=mode, num_shards=2, num_workers=3, budget_versions=6)).run() if resumed else None
    begins = len(earlier.started) if earlier else 0
    world = World(plan, earlier=earlier).run(until=6.3)
    before = world.primary().history
    assert len(before) > 8
    world.kill("server-1")
    world.start("server-1")
    world.run()
    assert [fields["cut"] for fields in world.noted("rollback")] == [6 if resumed else None]
    assert not [fields for fields in world.noted("discarded") if fields["reason"] == "superseded"]
    assert {row[1:4] for row in before} <= {row[1:4] for row in world.primary().history}
    ranges = [work.ranges for _, _, work in world.started[begins:]]
    assert len(set(ranges)) == len(ranges), "computed again, though it was kept"
    if mode == "bsp" and not resumed:
        assert world.primary().history == World(plan).run().primary().history, "not the same rounds again"


def test_kept_pushes_of_one_that_comes_back_too_late_are_counted_as_discarded():
    plan = rules(num_workers=2, budget_versions=40, cut_every=39, replay_window=80)
    world = World(plan).run(until=6.3)
    world.silent = {"worker-0"}
    world.kill("server-0")
    world.start("server-0")
    world.run(until=14.0)
    world.silent = set()
    world.run()
    noted = [fields for fields in world.noted("discarded") if fields["reason"] == "superseded"]
    assert {fields["worker"] for fields in noted} == {"worker-0"}
    last = [effect.fields for _, effect in world.effects if isinstance(effect, Progress)][-1]
    assert last["discarded"] == {"superseded": len(noted)}
    assert last["workers"]["worker-0"]["discarded"] == len(noted) > 0
    check_sums(world)


# What others say


def test_only_the_backup_acknowledges_what_the_backup_has():
    world = World(rules(durability="backup", budget_versions=40), num_servers=2).run(until=5.3)
    served = world.view.shards[0]
    world.loses = lambda sender, to, message: sender == served.backup and isinstance(message, Have)
    world.run(until=6.4)
    replica = world.machines[served.primary].primary.replica
    before = replica.state.position
    assert before < replica.log.end, "nothing waits for the backup"
    for sender in ("mallory", "worker-0", "server-7", served.primary):
        for position in (replica.log.end, 10**6):
            have = Have(1, 0, served.backup_incarnation, position)
            world.call(served.primary, "receive", sender, have)
    assert replica.state.position == before
    world.call(served.primary, "receive", served.backup, Have(1, 0, served.backup_incarnation, 10**6))
    assert replica.state.position <= replica.log.end
    world.loses = lambda sender, to, message: False
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    check_sums(world)


def test_views_are_the_coordinators_alone_whatever_servers_say():
    plan = rules(num_shards=2, budget_versions=20)
    undisturbed = World(plan).run()
    world = World(plan).run(until=4.5)
    lie = ViewIs(View(99, 9, (Served("server-7"), Served("server-7"))), {})
    for node in ("worker-0", "server-0"):
        world.call(node, "receive", "server-1", lie)
        assert world.machines[node].view == world.view
        assert world.said[-1][:2] == (node, "coordinator"), "it asks who knows"
        assert isinstance(world.said[-1][2], Beat)
    world.run()
    assert world.primary().history == undisturbed.primary().history


def test_pushes_that_nobody_asked_for_are_held_nowhere():
    world = World(rules(num_shards=2, budget_versions=100)).run(until=3.5)
    lead = world.machines["server-0"].primary
    own = next(m for name, to, m in world.said if (name, to) == ("worker-0", "server-0") and isinstance(m, Push))
    held = dict(lead.replica.held)
    for seq in range(1000, 1100):
        for sender, push in (("worker-0", replace(own, seq=seq)), ("worker-7", own)):
            world.call("server-0", "receive", sender, push)
        part = Part("worker-0", 1, seq, 0)
        world.call("server-0", "receive", "server-1", Staged(1, 1, (part, replace(part, worker="worker-7"))))
    assert lead.replica.held == held
    assert all(seq < 1000 and worker != "worker-7" for worker, _, seq in lead.lead._parts)


# Slow ones


def test_a_worker_that_hangs_makes_no_server_keep_what_max_delay_would_discard():
    def seconds(worker, work):
        return 1e9 if worker == 0 and work.clock == 2 else 1.0

    world = World(rules(num_workers=3, max_delay=4, budget_versions=200), seconds=seconds).run(until=60)
    state = world.machines["server-0"].primary.replica.state
    assert state.version > 80
    assert state.oldest_base == state.version - 4


@pytest.mark.parametrize("hangs_at", [0, 5])
@pytest.mark.parametrize("takeover", [False, True])
def test_a_worker_that_hangs_is_sent_away(hangs_at: int, takeover: bool):
    """In its first piece of work, too, in which others may be compiling; and when another lead has to notice it."""

    def seconds(worker, work):
        return 1e9 if worker == 0 and work.clock == hangs_at else 1.0

    plan = rules(mode="bsp", num_workers=4, evict_after=3.0, budget_versions=20, durability="backup")
    world = World(plan, num_servers=3, seconds=seconds).run(until=hangs_at + 0.6)
    if takeover:
        world.kill(world.view.shards[0].primary)
    world.run(until=80)
    left = [fields for fields in world.noted("membership") if fields.get("reason") == "straggler"]
    assert [fields["worker"] for fields in left] == ["worker-0"]
    assert world.primary().version == 20
    check_sums(world)


def test_who_waits_for_a_checkpoint_is_no_straggler():
    """Pieces of work are short, checkpoints slow."""
    plan = rules(mode="ksync", k=3, num_workers=5, evict_after=4.0, budget_versions=150, cut_every=None)
    world = SlowDisk(plan, seconds=lambda worker, work: 0.05 + 0.001 * worker)
    world.slow, world.disk_seconds = False, 1.0
    world.run()
    assert world.ended["coordinator"].code == 0
    assert {fields["reason"] for fields in world.noted("membership") if not fields["joined"]} == {"finished"}


def test_what_was_sent_in_vain_is_counted_over_all_leads():
    world = World(rules(budget_versions=40, cut_every=4), copies=2).run(until=12.3)
    world.kill("server-0")
    world.start("server-0")
    world.run()
    counts = [effect.fields["duplicate"] for _, effect in world.effects if isinstance(effect, Progress)]
    assert world.view.epoch == 2
    assert counts == sorted(counts)
    assert counts[-1] > counts[len(counts) // 2] > 0


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

    def __init__(self, rules: Rules, **other: Any):
        self.slow, self.disk_seconds, self.saves = True, 0.0, []
        super().__init__(rules, **other)

    def _carry_out(self, name: str, effect: Any) -> None:
        if isinstance(effect, Save) and self.slow:
            self.saves.append((name, effect))
        elif isinstance(effect, Save) and self.disk_seconds:
            self._after(self.disk_seconds, name, lambda: super(SlowDisk, self)._carry_out(name, effect))
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
