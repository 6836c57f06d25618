"""Silos and their server without processes: the protocol on a simulated network, whatever breaks; who reads what."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from silo_world import RUN, World, last_counted, sum_rules, vector

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.federated.silos.disk import Disk
from jaxdist.federated.silos.messages import Bye, Decline, Here, Train, Update
from jaxdist.federated.silos.roles import find_place, of_host, roles
from jaxdist.federated.silos.rules import Close, Opened, Rules
from jaxdist.federated.silos.server import Server
from jaxdist.federated.silos.share import of_server, of_silo
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, USAGE
from jaxdist.simulate.faults import Crash, Pause
from jaxdist.simulate.network import Disturbance, partition
from jaxdist.transport.machine import End, Send

BROKEN = Disturbance(drop=0.2, duplicate=0.2, delayed=0.2, delay=2.0)


def numbers(world: World) -> list[int]:
    """How many counted in each round."""
    return [len(who) for _, who in world.history]


def test_rounds_are_of_the_whole_cohort_and_all_end():
    cohorts = [(0, 2), (1, 3), (0, 1, 2, 3), (3,), (0, 1), (2, 3)]
    world = World(4, 6, cohort=lambda round_: cohorts[round_]).run()
    assert [who for _, who in world.history] == cohorts
    assert {end.code for end in world.ended.values()} == {DONE}
    assert len(world.ended) == 5
    assert world.trained == {(client, r): 1 for r, cohort in enumerate(cohorts) for client in cohort}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_breaks_a_round_is_of_the_updates_that_it_names_each_counted_once(seed: int):
    """World checks each round: updates are of this round and of this server, and what a silo goes on from is what
    it had after the last round in which it was counted."""
    faults = (
        Crash("silo-1", 5.0, 3.0),
        Crash("server", 14.0 + seed / 7, 4.0),
        Crash("silo-2", 20.0, None),
        Crash("server", 31.0 + seed / 3, 1.0),
        Pause("silo-3", 8.0, 9.0),
        Pause("server", 24.0, 7.0),
    )
    world = World(4, 12, seed=seed, disturbances=(BROKEN,), faults=faults).run()
    assert [round_ for round_, _ in world.history] == list(range(12))
    assert {end.code for end in world.ended.values()} == {DONE}
    again = World(4, 12, seed=seed, disturbances=(BROKEN,), faults=faults).run()
    assert again.simulation.trace_hash == world.simulation.trace_hash


def test_a_killed_silo_is_left_out_once_its_lease_is_over_and_comes_back():
    world = World(3, 20, faults=(Crash("silo-1", 3.0, 12.0),)).run()
    there = [1 in who for _, who in world.history]
    assert numbers(world)[0] == numbers(world)[-1] == 3
    gone = there.index(False)
    assert there == [True] * gone + [False] * there.count(False) + [True] * (20 - gone - there.count(False))
    assert 4.0 < world.closed_at[gone] - world.closed_at[gone - 1] < 8.0  # its lease, and not the deadline
    assert [fields["there"] for fields in world.noted("silo") if fields["silo"] == 1] == [True, False, True]


def test_a_silo_that_is_quickly_back_trains_the_round_anew_and_is_not_left_out():
    world = World(3, 3, faults=(Crash("silo-1", 1.5, 1.0),), train_seconds=lambda client: 2.0).run()
    assert numbers(world) == [3, 3, 3]
    assert world.closed_at[0] > 4.0  # it began anew


def test_a_slow_silo_is_left_out_after_the_deadline_and_what_it_has_trained_in_vain_is_not_sent():
    world = World(3, 4, train_seconds=lambda client: 25.0 if client == 1 else 1.0, deadline=20.0).run()
    assert all(1 not in who for _, who in world.history)
    assert world.trained[1, 0] == world.trained[1, 1] == 1
    assert not world.machines["server"].counts
    assert world.closed_at[0] == pytest.approx(20.1, abs=1.1)


def test_a_round_of_too_few_waits_for_those_that_come_back():
    faults = (Crash("silo-0", 1.5, 60.0), Crash("silo-1", 1.5, 100.0))
    world = World(3, 4, min_silos=2, faults=faults, deadline=10.0).run()
    assert min(numbers(world)) == 2
    assert 60 < world.closed_at[1] < 70


def test_nothing_begins_before_all_silos_are_there_or_were_waited_for():
    late = partition(["silo-2"], None, 0.0, 9.0)
    assert numbers(World(3, 3, disturbances=tuple(late)).run()) == [3, 3, 3]
    never = partition(["silo-2"], None, 0.0, 1000.0)
    world = World(3, 3, disturbances=tuple(never), deadline=15.0).run()
    assert numbers(world) == [2, 2, 2]
    assert world.closed_at[0] > 15.0


def test_the_server_goes_on_from_its_checkpoint_and_silos_from_what_they_had_then():
    world = World(3, 9, faults=(Crash("server", 8.0, 2.0),), save_every=3).run()
    assert numbers(world) == [3] * 9
    repeated = [round_ for (client, round_), count in world.trained.items() if client == 0 and count > 1]
    assert repeated == [6, 7]  # begun before the server was lost, and after the last checkpoint
    assert all(len(states) <= 4 for states in world.own.values())  # no silo keeps more than it may be asked for
    undisturbed = World(3, 9).run()
    assert {c: s[8] for c, s in world.own.items()} == {c: s[8] for c, s in undisturbed.own.items()}


def test_a_silo_of_another_config_is_refused():
    world = World(3, 2, identity=lambda client: "other" if client == 2 else "config", deadline=5.0).run()
    assert world.ended["silo-2"].code == USAGE
    assert "another config" in world.ended["silo-2"].reason
    assert numbers(world) == [2, 2]


def test_one_silo_may_leave_and_the_others_go_on_at_once():
    world = World(3, 6).run(until=2.5)
    world.call("silo-1", "leave")
    world.run()
    assert world.ended["silo-1"] == End(DONE, "it was told to leave")
    assert numbers(world)[-1] == 2
    assert world.simulation.now < 9.0


def test_a_stop_ends_all_with_its_exit_code():
    world = World(3, 100).run(until=5.5)
    world.call("server", "finish", RESTARTABLE, "signal")
    world.run()
    assert {end.code for end in world.ended.values()} == {RESTARTABLE}
    assert len(world.ended) == 4


# Single messages.


def server(**changes: Any) -> Server:
    rules = Rules("config", num_silos=3, min_silos=1, deadline=20.0, lease=5.0)
    return Server(dataclasses.replace(rules, **changes), epoch=7)


def here(nonce: str, *has: int) -> Here:
    return Here(nonce, "config", *(has or (-1, -1, -1)))


def begun() -> Server:
    """With silos a, b, c, and round 0 open."""
    machine = server()
    machine.start(0.0)
    machine.begin(Opened(RUN, 0, (0, 1, 2), (np.zeros(2),)), 0.0)
    for client, nonce in enumerate("abc"):
        machine.receive(f"silo-{client}", here(nonce), 0.0)
    return machine


def update(nonce: str, epoch: int = 7, round_: int = 0) -> Update:
    return Update(nonce, epoch, round_, (np.zeros(1),))


def test_updates_count_once_in_their_own_round_and_of_the_newest_process_alone():
    machine = begun()
    for sender, message in [
        ("silo-0", update("a")),
        ("silo-0", update("a")),
        ("silo-1", update("b", epoch=6)),
        ("silo-1", update("b", round_=1)),
        ("mallory", update("b")),
        ("silo-7", update("b")),
    ]:
        assert not [e for e in machine.receive(sender, message, 1.0) if isinstance(e, Close)]
    machine.receive("silo-2", here("new"), 1.0)
    machine.receive("silo-2", update("c"), 1.0)  # from the process whose place it has taken
    effects = machine.receive("silo-2", here("c"), 1.0)
    assert [e.message.code for e in effects if isinstance(e, Send)] == [DONE]
    assert machine.counts == {"duplicate": 1, "late": 2, "fenced": 2}
    machine.receive("silo-1", update("b"), 2.0)
    (close,) = (e for e in machine.receive("silo-2", update("new"), 2.0) if isinstance(e, Close))
    assert list(close.updates) == [0, 1, 2]
    assert close.updates[2].nonce == "new"
    machine.receive("silo-0", update("a"), 3.0)  # its answer was lost, and it says it again
    assert machine.counts == {"duplicate": 2, "late": 2, "fenced": 2}


def test_parameters_are_sent_again_only_to_silos_that_do_not_have_them():
    machine = begun()
    has = [e for e in machine.receive("silo-0", here("a", 7, 0, 0), 1.0) if isinstance(e, Send)]
    assert has == []
    again = [machine.receive("silo-1", here("b"), float(t)) for t in range(1, 9)]
    sent = [any(isinstance(e, Send) and isinstance(e.message, Train) for e in effects) for effects in again]
    assert sent == [False, True, False, True, False, False, False, True]  # 2, 4, 8 signs of life later


def test_who_has_left_is_not_waited_for():
    machine = begun()
    machine.receive("silo-0", update("a"), 1.0)
    machine.receive("silo-1", update("b"), 1.0)
    effects = machine.receive("silo-2", Bye("c"), 1.5)
    assert [list(e.updates) for e in effects if isinstance(e, Close)] == [[0, 1]]


# Secure aggregation.


def test_the_server_learns_sums_alone():
    world = World(5, 4, sums=sum_rules(5)).run()
    assert numbers(world) == [5] * 4  # World compares each sum
    assert len(world.seen) == 20
    for client, round_, masked in world.seen:
        assert not (masked == vector(client, round_)).any()


@pytest.mark.parametrize(("phase", "first"), [("PublicKeys", 4), ("Shares", 4), ("Masked", 4), ("Reveal", 5)])
def test_a_silo_that_falls_silent_in_any_phase_costs_no_round(phase: str, first: int):
    world = World(5, 3, sums=sum_rules(5), silent_from={"silo-1": phase}).run()
    assert numbers(world) == [first, 4, 4]
    assert not world.noted("no_sum")


@pytest.mark.parametrize("phase", ["PublicKeys", "Shares", "Masked", "Reveal"])
def test_two_that_fall_silent_are_too_many_and_there_is_no_sum(phase: str):
    silent = {"silo-1": phase, "silo-3": phase}
    world = World(5, 3, sums=sum_rules(5), silent_from=silent, deadline=10.0).run(until=100.0)
    assert {who for _, who in world.history} <= {()}  # a round that is lost, or none
    assert world.noted("no_sum")
    assert max(map(len, world.masked.values()), default=0) <= 1


def test_a_silo_declines_to_mask_its_update_again_whatever_the_server_asks():
    world = World(5, 3, sums=sum_rules(5))
    while not world.masked:
        world.simulation.step()
    (client,) = {client for client, _ in world.masked}
    silo = world.machines[f"silo-{client}"]
    for epoch, attempt in [(1, 1), (2, 0)]:
        asked = Train(silo.nonce, epoch, 0, attempt, RUN, -1, (), (np.zeros(1),))
        said = [e.message for e in silo.receive("server", asked, world.simulation.now) if isinstance(e, Send)]
        assert said == [Decline(silo.nonce, epoch, 0, attempt)]


@pytest.mark.parametrize("at", [1.0, 2.005])
def test_a_silo_that_dies_and_comes_back_takes_part_again(at: float):
    world = World(5, 5, sums=sum_rules(5), faults=(Crash("silo-1", at, 1.0),)).run()
    assert min(numbers(world)) >= 4
    assert numbers(world)[-1] == 5
    assert max(map(len, world.masked.values())) == 1


def test_below_the_threshold_a_round_is_lost_and_nobody_masks_its_update_again():
    faults = (Crash("silo-1", 1.5, None), Crash("silo-2", 1.5, 20.0))
    world = World(5, 4, sums=sum_rules(5), faults=faults).run()
    assert numbers(world) == [5, 0, 4, 4]
    (lost,) = (fields for fields in world.noted("no_sum") if fields["lost"])
    assert lost["round"] == 1
    assert max(map(len, world.masked.values())) == 1


@pytest.mark.parametrize("seed", range(4))
def test_whatever_breaks_a_sum_is_right_and_no_update_is_in_two(seed: int):
    broken = Disturbance(drop=0.1, duplicate=0.1, delayed=0.1, delay=1.0)
    faults = (Crash("silo-1", 3.0, 3.0), Crash("server", 9.0 + seed / 5, 4.0), Pause("silo-3", 6.0, 9.0))
    world = World(5, 8, sums=sum_rules(5), seed=seed, disturbances=(broken,), faults=faults).run()
    assert len(world.history) == 8
    assert set(numbers(world)) <= {0, 4, 5}
    assert numbers(world)[-1] >= 4
    assert max(map(len, world.masked.values())) == 1
    assert {end.code for end in world.ended.values()} == {DONE}


# Disks, data, places.


def test_a_disk_keeps_states_by_round_and_gives_an_update_out_once(tmp_path):
    like = {"c": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int32)}
    state = {"c": np.ones((2, 3), np.float32), "n": np.array(5, np.int32)}
    disk = Disk(tmp_path, "0123456789abcdef", like)
    for round_ in (0, 3, 4):
        disk.save(round_, state)
    disk.keep_only({3, 9})
    assert disk.load(0) is None
    found = disk.load(3)
    assert found is not None
    np.testing.assert_array_equal(found["c"], state["c"])
    assert found["n"] == 5
    assert [disk.give_out(round_) for round_ in (4, 4, 3, 5)] == [True, False, False, True]
    assert not Disk(tmp_path, "0123456789abcdef", like).give_out(5)  # another process of this silo
    assert Disk(tmp_path, "0" * 16, like).give_out(5)  # another run
    for name in ("../elsewhere", "", "0123456789ABCDEF"):
        with pytest.raises(ValueError, match="not the name of a run"):
            Disk(tmp_path, name, like)


def test_a_silo_has_its_own_samples_and_the_server_none():
    config = load("fed_silos", []).config
    data = build_data(config.data, config.seed)
    assert data.partition is not None
    own = data.partition.of(2)
    share = of_silo(data, 2)
    source: Any = share.train.source
    assert {len(array) for array in source.rows.values()} == {len(own)}
    shuffled = np.random.default_rng(0).permutation(own)
    for name, rows in source.get(shuffled).items():
        np.testing.assert_array_equal(rows, data.train.source.get(shuffled)[name])
    for other in (0, 1, 3, 4):
        with pytest.raises(AssertionError, match="another silo's"):
            source.get(data.partition.of(other)[:1])
    assert share.partition is not None
    assert share.partition.sizes.tolist() == [0, 0, len(own), 0, 0]
    assert len(share.validation) == 0
    served: Any = of_server(data)
    assert {len(array) for array in served.train.source.rows.values()} == {0}
    assert len(served.validation) == len(data.validation)


def test_places_are_the_launchers_or_by_number_and_alone_all_are_simulated():
    given = {"JAXDIST_RENDEZVOUS": "a:1", "JAXDIST_ROLE": "silo", "JAXDIST_ROLE_INDEX": "3", "JAXDIST_JOB_TOKEN": "t"}
    place = find_place(given, 5, 0, 1, None)
    assert place is not None
    assert (place.name, place.log_name, place.rendezvous, place.token) == ("silo-3", "silo-3", "a:1", "t")
    assert find_place({}, 5, 0, 1, None) is None
    places = [find_place({}, 2, process, 3, "head:9") for process in range(3)]
    assert [place and place.name for place in places] == ["server", "silo-0", "silo-1"]
    with pytest.raises(UserError, match=re.escape("a server and 2 silos are 3 processes, the job has 2")):
        find_place({}, 2, 0, 2, "head:9")
    dealt = [of_host(roles(5), host, 3) for host in range(3)]
    assert [[(role.name, index) for role, index in own] for own in dealt] == [
        [("server", 0), ("silo", 0), ("silo", 1)],
        [("silo", 2), ("silo", 3)],
        [("silo", 4)],
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("strategy.silos.min_silos=9", "min_silos: 9 of a cohort of 5"),
        ("strategy={sampling: poisson, clients_per_round: 3}", "sampling: poisson is of simulated clients"),
        ("strategy.availability={dropout: 0.1}", "strategy.availability: real silos"),
        ("strategy.privacy={kind: central, noise_multiplier: 1.0}", "privacy: central counts on chance"),
        ("strategy.secure_aggregation={identities: true, max_weight: 999}", "identities: silos have no keys"),
        ("gradient_compression.up={kind: int8}", "gradient_compression: silos send updates as they are"),
        ("data.partition.validation_fraction=0.2", "validation_fraction: each silo's samples stay"),
    ],
)
def test_what_silos_cannot_do_is_refused(override: str, problem: str):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load("fed_silos", [override])


def test_a_run_may_go_on_between_processes_or_simulated():
    assert load("fed_silos", []).config.identity() == load("fed_silos", ["strategy.silos=null"]).config.identity()


def test_the_last_round_in_which_each_was_counted():
    assert last_counted([(0, (0, 1)), (1, (1,)), (2, ())]) == {0: 0, 1: 1}
