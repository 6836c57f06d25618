"""The machines of the parameter server, one claim at a time; all at once is `test_ps_simulated`."""

import json
from collections import Counter

import pytest
from ps_world import World, applied_positions, check_sums, rules

from jaxdist.parameter_server.contracts import Progress, SaveOwn, Send, Snapshot
from jaxdist.parameter_server.coordinator import going_on
from jaxdist.parameter_server.messages import Alive, Fenced, Hello, Push, Taken, from_plain, to_plain
from jaxdist.parameter_server.shard import Server
from jaxdist.transport.machine import index_of


def slow_first(worker: int, work: object) -> float:
    return 4.0 if worker == 0 else 1.0


def test_bsp_applies_one_push_of_every_worker_in_their_order():
    world = World(rules(mode="bsp", num_workers=3, num_shards=2), seconds=lambda worker, work: 3.0 - worker).run()
    rounds = [[row for row in world.primary(1).history if row[0] == version] for version in range(1, 9)]
    assert [[worker for _, worker, *_ in rows] for rows in rounds] == [["worker-0", "worker-1", "worker-2"]] * 8
    assert all(base == version - 1 for version, *_, base in world.primary().history)
    check_sums(world)


def test_ksync_of_all_workers_is_bsp():
    bsp, ksync = (World(rules(mode=mode, k=3, num_workers=3)).run() for mode in ("bsp", "ksync"))
    assert bsp.primary().history == ksync.primary().history


def test_ksync_goes_on_without_the_slowest_and_discards_what_comes_late():
    world = World(rules(mode="ksync", k=2, num_workers=3, grace=0.2), seconds=slow_first).run()
    assert all(base == version - 1 for version, *_, base in world.primary().history)
    assert {worker for _, worker, *_ in world.primary().history} == {"worker-1", "worker-2"}
    assert {fields["reason"] for fields in world.noted("discarded")} == {"late"}
    check_sums(world)


def test_ksync_waits_the_grace_for_one_that_is_nearly_there():
    world = World(rules(mode="ksync", k=2, num_workers=3, grace=0.2)).run()
    assert len(world.primary().history) == 3 * 8


def test_async_with_one_worker_is_sequential():
    world = World(rules(num_workers=1)).run()
    assert world.primary().history == [(v, "worker-0", 1, v, v - 1) for v in range(1, 9)]
    assert [work.ranges for _, _, work in world.started] == [((3 * i, 3),) for i in range(8)]
    check_sums(world)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_ssp_never_lets_a_worker_run_more_than_its_bound_ahead(bound: int):
    world = World(rules(mode="ssp", bound=bound, num_workers=3, budget_versions=20), seconds=slow_first).run()
    done = dict.fromkeys(("worker-0", "worker-1", "worker-2"), 0)
    gaps = []
    ends = sorted((now + world.seconds(int(name[-1]), work), 0, name) for now, name, work in world.started)
    starts = [(now, 1, (name, work.clock)) for now, name, work in world.started]
    for _, is_start, what in sorted([*ends, *starts], key=lambda event: event[:2]):
        if is_start:
            gaps.append(what[1] - min(done.values()))
        else:
            done[what] += 1
    assert max(gaps) == bound


def test_buffered_waits_for_k_pushes_but_no_worker_waits_for_the_update():
    world = World(rules(mode="buffered", k=3, num_workers=1, budget_versions=4)).run()
    assert [row[0] for row in world.primary().history] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    starts = [now for now, _, _ in world.started]
    assert all(later - now == pytest.approx(1.0) for now, later in zip(starts, starts[1:], strict=False))


def test_what_is_staler_than_the_limit_is_discarded_for_good():
    world = World(rules(max_delay=2, num_workers=3, budget_versions=12), seconds=slow_first).run()
    assert {(fields["worker"], fields["reason"]) for fields in world.noted("discarded")} == {("worker-0", "stale")}
    assert all(version - 1 - base <= 2 for version, *_, base in world.primary().history)
    ledger = world.commits[12].meta["ledger"]
    assert ledger["applied"] == 36
    assert ledger["discarded"] == 3 * len(world.noted("discarded"))
    check_sums(world)


@pytest.mark.parametrize("durability", ["replay", "backup"])
def test_messages_that_come_three_times_change_nothing(durability: str):
    once, thrice = (
        World(rules(num_shards=2, num_workers=3, durability=durability), num_servers=4, copies=copies).run()
        for copies in (1, 3)
    )
    assert [row[:4] for row in once.primary().history] == [row[:4] for row in thrice.primary().history]
    assert once.primary(1).value == thrice.primary(1).value
    check_sums(thrice)


def test_the_samples_of_a_worker_that_died_are_done_by_another():
    world = World(rules(num_workers=2, budget_versions=20)).run(until=4.5)
    world.kill("worker-0")
    world.run()
    (left,) = (fields for fields in world.noted("membership") if fields.get("reason") == "lease")
    assert left["worker"] == "worker-0"
    assert applied_positions(world) == list(range(60)), "a hole, or a sample twice"
    check_sums(world)


def test_a_worker_that_was_silent_too_long_is_fenced_and_comes_back_as_another():
    world = World(rules(num_workers=2, budget_versions=30)).run(until=4.5)
    world.silent = {"worker-0"}
    world.run(until=10.0)
    world.silent = set()
    world.run()
    assert any(isinstance(message, Fenced) and to == "worker-0" for _, to, message in world.said)
    incarnations = {row[2] for row in world.primary().history if row[1] == "worker-0"}
    assert incarnations == {1, 2}
    positions = sorted(row[3] for row in world.primary().history if row[1:3] == ("worker-0", 2))
    assert positions == list(range(1, len(positions) + 1))
    assert world.ended["worker-0"].code == 0


def test_a_push_of_a_fenced_process_is_refused_and_not_taken():
    world = World(rules(num_workers=2, budget_versions=30)).run(until=6.5)
    world.kill("worker-0")
    world.start("worker-0")
    world.run(until=8.0)
    old = next(m for name, _, m in world.said if name == "worker-0" and isinstance(m, Push) and m.incarnation == 1)
    before = world.primary().value
    world.call("server-0", "receive", "worker-0", old)
    sender, to, answer = world.said[-1]
    assert (sender, to, type(answer), answer.reason) == ("server-0", "worker-0", Fenced, "replaced")
    assert world.primary().value == before


@pytest.mark.parametrize("mode", ["async", "bsp"])
def test_after_the_loss_of_a_shard_kept_pushes_are_applied_again_exactly_once(mode: str):
    plan = rules(mode=mode, num_shards=2, num_workers=3, budget_versions=30, cut_every=7, replay_window=12)
    world = World(plan).run(until=9.3 if mode == "bsp" else 4.3)
    before = world.primary().version
    world.kill("server-1")
    world.start("server-1")
    world.run()
    assert world.view.epoch == 2
    assert 0 < world.noted("view")[-1]["cut"] < before
    assert not [fields for fields in world.noted("membership") if fields.get("reason") == "lease"]
    assert [row[:4] for row in world.primary(0).history] == [row[:4] for row in world.primary(1).history]
    check_sums(world)
    if mode == "bsp":
        undisturbed = World(plan).run()
        assert undisturbed.primary().history == world.primary().history, "not the same rounds again"


def test_with_memory_alone_samples_since_the_checkpoint_are_done_again():
    world = World(rules(durability="memory", budget_versions=30, cut_every=7)).run(until=8.3)
    world.kill("server-0")
    world.start("server-0")
    world.run()
    assert world.noted("rollback")[0]["cut"] == 14
    assert applied_positions(world) == list(range(90))
    check_sums(world)


def test_a_server_that_hears_of_training_before_it_is_welcome_introduces_itself():
    """A Beat of a process that has no number yet is taken for that of one that was given up."""
    server = Server("server-0", "nonce", rules(), lambda shard: None)
    hello = [effect for effect in server.start(0.0) if isinstance(effect, Send)]
    again = server.receive("worker-0", Alive(1, 1, 3, 2, 0, False), 0.1)
    assert again == hello
    assert isinstance(hello[0].message, Hello)


@pytest.mark.parametrize("victim", ["server-0", "server-1"])
def test_a_backup_takes_over_without_going_back(victim: str):
    plan = rules(durability="backup", num_shards=2, num_workers=3, budget_versions=40)
    world = World(plan, num_servers=5).run(until=6.3)
    assert all(served.ready for served in world.view.shards)
    world.kill(victim)
    world.run(until=15.0)
    assert world.view.epoch == 1
    assert victim not in {served.primary for served in world.view.shards}
    assert all(served.ready for served in world.view.shards), "no spare has become the new backup"
    world.names.remove(victim)
    world.run(until=60.0)
    assert world.ended["worker-0"].code == 0
    for shard in (0, 1):
        served = world.view.shards[shard]
        assert world.stores[served.primary].history == world.stores[served.backup].history
    check_sums(world)


def test_training_goes_on_without_the_coordinator_which_goes_on_from_its_state():
    world = World(rules(budget_versions=40, durability="replay", replay_window=50)).run(until=5.5)
    world.kill("coordinator")
    before = world.stores["server-0"].version
    world.run(until=10.5)
    assert world.stores["server-0"].version > before + 5
    world.start("coordinator")
    world.run()
    assert world.view.number == 1, "it has taken somebody for lost"
    assert {end.code for end in world.ended.values()} == {0}
    check_sums(world)


def test_the_budget_ends_in_a_checkpoint_and_everybody_ends():
    world = World(rules(num_shards=3, num_workers=4, budget_versions=None, budget_samples=30)).run()
    last = max(world.commits)
    assert {name: end.code for name, end in world.ended.items()} == dict.fromkeys(world.names, 0)
    assert all(world.primary(shard).version == last for shard in range(3))
    ledger = world.commits[last].meta["ledger"]
    assert ledger["applied"] >= 30
    assert ledger["leased"] == 0
    assert ledger["applied"] + sum(count for _, count in ledger["free"]) == ledger["next_position"]
    check_sums(world)


def test_a_job_that_was_stopped_goes_on_from_its_checkpoint_with_other_servers_and_workers():
    world = World(rules(budget_versions=20, cut_every=None)).run(until=5.5)
    world.call("coordinator", "stop", 75)
    world.run()
    assert {end.code for end in world.ended.values()} == {75}
    (cut,) = world.commits
    assert 8 <= cut < 12
    again = World(rules(budget_versions=20, num_workers=3, num_shards=2), earlier=world).run()
    assert {end.code for end in again.ended.values()} == {0}
    ledger = again.commits[20].meta["ledger"]
    assert ledger["applied"] == 60
    assert ledger["next_position"] == 60 + sum(count for _, count in ledger["free"])
    free = {p for first, count in ledger["free"] for p in range(first, first + count)}
    done = set(range(ledger["next_position"])) - free
    assert [again.primary(shard).value for shard in (0, 1)] == [-sum(p + 1 for p in done)] * 2


def test_a_resumed_job_that_loses_a_shard_before_its_first_checkpoint_begins_again_from_there():
    earlier = World(rules(budget_versions=8)).run()
    world = World(rules(budget_versions=30, cut_every=20, replay_window=50), earlier=earlier).run(until=3.5)
    assert world.primary().version > 8
    world.kill("server-0")
    world.start("server-0")
    world.run()
    assert [fields["cut"] for fields in world.noted("rollback")] == [8]
    assert {end.code for end in world.ended.values()} == {0}
    assert world.commits[30].meta["ledger"]["applied"] == 90


def test_failing_ends_everybody_at_once():
    world = World(rules(budget_versions=100)).run(until=3.5)
    world.call("coordinator", "fail", "a loss that is not finite")
    world.run()
    assert {end.code for end in world.ended.values()} == {1}
    assert world.now < 4.5


class KilledAfterCommit(World):
    """The coordinator is lost when the first checkpoint is on disk, and it does not know it yet."""

    def call(self, name, method, *arguments):
        before = len(self.commits)
        super().call(name, method, *arguments)
        if before == 0 and self.commits:
            self.kill("coordinator")


def test_a_coordinator_lost_between_a_commit_and_its_knowledge_goes_on_where_it_was():
    world = KilledAfterCommit(rules(num_shards=2, budget_versions=20)).run(until=5.0)
    known = world.machines["server-0"].view.number
    world.state = json.dumps(going_on(json.loads(world.state), 4, 2))
    world.start("coordinator")
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert not world.noted("rollback")
    assert world.view.number == known
    check_sums(world)


def test_all_go_back_when_a_coordinator_finds_the_last_checkpoint_damaged():
    world = World(rules(num_shards=2, budget_versions=20)).run(until=6.5)
    known = world.view.number
    assert max(world.commits) == 8
    world.kill("coordinator")
    world.run(until=7.0)
    world.state = json.dumps(going_on(json.loads(world.state), 4, 2))
    world.start("coordinator")
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert [fields["cut"] for fields in world.noted("rollback")] == [4]
    assert world.view.number > known
    assert world.primary().value == world.primary(1).value == -sum(range(1, 3 * 20 + 1))


def test_a_job_that_is_stopped_before_it_begins_trains_nothing_and_ends():
    earlier = World(rules()).run()
    world = World(rules(budget_versions=100), earlier=earlier)
    started = len(world.started)
    world.call("coordinator", "stop", 0)
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert (len(world.ended), len(world.started), max(world.commits)) == (len(world.names), started, 8)


def test_a_coordinator_started_again_after_a_failure_begins_beyond_all_views():
    world = World(rules(budget_versions=20)).run(until=5.0)
    known = world.view.number
    world.call("coordinator", "fail", "a full disk")
    world.run()
    for name in [*world.machines]:
        world.kill(name)
    world.ended.clear()
    world.state = json.dumps(going_on(json.loads(world.state), 4, 1))
    for name in world.names:
        world.start(name)
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    assert world.view.number > known
    assert world.primary().value == -sum(range(1, 3 * 20 + 1))


def test_a_worker_with_a_full_window_waits_for_a_checkpoint_that_is_made_for_it():
    world = World(rules(num_workers=1, cut_every=None, replay_window=1, budget_versions=6)).run()
    assert sorted(world.commits) == [1, 2, 3, 4, 5, 6]
    check_sums(world)


def test_a_workers_own_state_goes_with_the_checkpoint_that_holds_its_push():
    world = World(rules(num_workers=2, mode="bsp", cut_every=3)).run()
    own = [(effect.version, effect.seq) for name, effect in world.effects if isinstance(effect, SaveOwn)]
    assert sorted(set(own)) == [(3, 3), (6, 6), (8, 8)]


def test_evaluation_gets_the_parts_of_one_version():
    world = World(rules(num_shards=3, keep_every=3)).run()
    versions = []
    for _, effect in world.effects:
        if isinstance(effect, Snapshot):
            assert len({int(arrays[0][0]) for arrays in effect.parts}) == 1
            versions.append(effect.version)
    assert versions[-1] == 8
    assert versions == sorted(set(versions))


def test_a_persistent_straggler_is_told_to_end_and_its_samples_are_done_by_others():
    def seconds(worker, work):
        return 10.0 if worker == 0 else 1.0

    world = World(rules(num_workers=4, evict_after=3.0, budget_versions=100), seconds=seconds).run()
    (left,) = (fields for fields in world.noted("membership") if fields.get("reason") == "straggler")
    assert left["worker"] == "worker-0"
    assert world.ended["worker-0"].code == 0
    assert applied_positions(world) == list(range(300))


def test_work_in_proportion_to_speed_takes_equal_time():
    def seconds(worker, work):
        return (2.0 if worker == 0 else 0.5) * sum(count for _, count in work.ranges)

    plan = rules(num_workers=2, samples_per_push=8, proportional_work=True, budget_versions=40)
    counts = {name: sum(n for _, n in work.ranges) for _, name, work in World(plan, seconds=seconds).run().started}
    assert counts == {"worker-0": 2, "worker-1": 8}
    plan = rules(num_workers=2, samples_per_push=8, local_steps=4, proportional_work=True, budget_versions=40)
    steps = {name: work.local_steps for _, name, work in World(plan, seconds=seconds).run().started}
    assert steps == {"worker-0": 1, "worker-1": 4}


def test_reports_add_up():
    world = World(rules(num_workers=3, max_delay=2, budget_versions=12), seconds=slow_first).run()
    last = [effect.fields for _, effect in world.effects if isinstance(effect, Progress)][-1]
    assert last["version"] == last["applied"] == sum(last["staleness"].values()) == 12
    assert last["samples"] == 36
    assert last["sums"] == {"loss": 12.0}
    assert last["discarded"] == {"stale": len(world.noted("discarded"))}
    assert sum(worker["applied"] for worker in last["workers"].values()) == 12
    of_workers = sum((Counter(worker["staleness"]) for worker in last["workers"].values()), Counter())
    assert last["staleness"] == of_workers
    for name, worker in last["workers"].items():
        seconds = (worker["applied"] + worker["discarded"]) * slow_first(index_of(name), None)
        assert worker["compute_seconds"] == pytest.approx(seconds), "those of discarded pushes count, too"


@pytest.mark.parametrize(
    "change", [{"kind": "Nothing"}, {"seq": "1"}, {"more": 1}, {"epoch": None}, {"seq": True}, {"shard": [0]}]
)
def test_what_is_no_message_is_refused(change: dict):
    plain = to_plain(Taken(1, 1, 0, 1))
    assert from_plain(json.loads(json.dumps(plain))) == Taken(1, 1, 0, 1)
    with pytest.raises(ValueError, match=r"Taken|no message"):
        from_plain({**plain, **change})
