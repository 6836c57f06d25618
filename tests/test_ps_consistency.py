"""Controllers against their definitions, and the ledger of samples against a plain set."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.parameter_server.build import replay_window
from jaxdist.parameter_server.consistency import Asynchronous, Buffered, FirstK, Pending, Synchronous
from jaxdist.parameter_server.ledger import Ledger
from jaxdist.parameter_server.log import Follower, Log
from jaxdist.parameter_server.pace import Pace

WORKERS = ["worker-2", "worker-10", "worker-0", "worker-1"]


def push(worker: str, base: int = 5, arrived: float = 0.0, seq: int = 1) -> Pending:
    return Pending(worker, 1, seq, base, arrived)


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("order", list(itertools.permutations(WORKERS))[::5])
def test_bsp_waits_for_everybody_and_sums_in_the_order_of_workers(order, count):
    pending = [push(worker) for worker in order[:count]]
    chosen, again = Synchronous().next_update(pending, WORKERS, 5, 0.0)
    expected = ["worker-0", "worker-1", "worker-2", "worker-10"] if count == len(WORKERS) else []
    assert [one.worker for one in chosen] == expected
    assert again is None


@given(
    k=st.integers(1, 4),
    grace=st.sampled_from([0.0, 1.0]),
    arrivals=st.lists(st.floats(0, 4), max_size=4),
    now=st.floats(0, 6),
)
def test_ksync_closes_at_k_and_the_grace_or_with_everybody(k, grace, arrivals, now):
    """By the definition: at every moment, who has come, and when the k-th did."""
    arrivals = sorted(arrivals)
    here = [time for time in arrivals if time <= now]
    pending = [push(WORKERS[i], arrived=time) for i, time in enumerate(here)]
    chosen, again = FirstK(k, grace).next_update(pending, WORKERS, 5, now)
    if len(here) == len(WORKERS) or (len(here) >= k and now >= here[k - 1] + grace):
        assert sorted(one.worker for one in chosen) == sorted(one.worker for one in pending)
    else:
        assert not chosen
        assert again == (here[k - 1] + grace if len(here) >= k else None)


@pytest.mark.parametrize(("base", "reason"), [(3, "late"), (4, "late"), (5, None)])
def test_ksync_takes_only_pushes_on_the_current_parameters(base, reason):
    assert FirstK(2).rejects(push("worker-0", base), 5) == reason


def test_ksync_forms_rounds_again_of_pushes_kept_for_versions_to_come():
    pending = [push("worker-0", 7), push("worker-0", 8, seq=2), push("worker-1", 8)]
    chosen, _ = FirstK(2).next_update(pending, ["worker-0", "worker-1"], 5, 0.0)
    assert [(one.worker, one.base) for one in chosen] == [("worker-0", 7)]


@pytest.mark.parametrize("controller", [Asynchronous(max_delay=2), Asynchronous(3, 2), Buffered(2, 2)])
def test_a_push_is_stale_when_more_than_the_limit_of_versions_were_applied_since(controller):
    for base, version in itertools.product(range(8), range(8)):
        expected = "stale" if version - base > 2 else None
        assert controller.rejects(push("worker-0", base), version) == expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 4))
def test_ssp_starts_a_clock_when_the_slowest_is_at_most_the_bound_behind(clocks, bound):
    for clock in clocks:
        allowed = all(clock - other <= bound for other in clocks)
        assert Asynchronous(bound).may_start(clock, clocks, 0) == allowed
        assert Asynchronous(None).may_start(clock, clocks, 0)
        assert not Asynchronous(None).may_start(clock, clocks, 1), "while a push of its own is undecided"


@given(st.integers(1, 4), st.lists(st.sampled_from(WORKERS), max_size=9))
def test_buffered_takes_k_in_the_order_of_arrival(k, arrivals):
    pending = [push(worker, arrived=i, seq=i) for i, worker in enumerate(arrivals)]
    updates = []
    while chosen := Buffered(k).next_update(pending, WORKERS, 5, 0.0)[0]:
        updates.append(list(chosen))
        pending = pending[len(chosen) :]
    whole = [push(worker, arrived=i, seq=i) for i, worker in enumerate(arrivals)]
    assert updates == [whole[i : i + k] for i in range(0, len(whole) - k + 1, k)]


ACTIONS = st.sampled_from(["take", "release", "apply", "discard", "claim"])


@given(st.lists(st.tuples(ACTIONS, st.integers(1, 9)), max_size=40))
def test_every_position_has_one_fate(actions):
    ledger, free, taken, new = Ledger(), set(), [], 0
    done = {"apply": 0, "discard": 0}
    for action, number in actions:
        if action == "take":
            ranges = ledger.take(number)
            mine = {p for first, count in ranges for p in range(first, first + count)}
            expected = sorted(free)[:number]
            expected += range(new, new + number - len(expected))
            assert sorted(mine) == expected, "not the first free ones, then new ones"
            new, free = max(new, *(p + 1 for p in mine)), free - mine
            taken.append(ranges)
        elif action == "claim":
            ranges = ((max(0, new - 5) + number, number),)
            mine = set(range(ranges[0][0], ranges[0][0] + number))
            possible = all(p in free or p >= new for p in mine)
            assert ledger.claim(ranges) == possible
            if possible:
                free = (free | set(range(new, max(mine) + 1))) - mine
                new = max(new, max(mine) + 1)
                taken.append(ranges)
        elif taken:
            ranges = taken.pop(number % len(taken))
            mine = {p for first, count in ranges for p in range(first, first + count)}
            if action == "release":
                ledger.release(ranges)
                free |= mine
            else:
                ledger.settle(ranges, applied=action == "apply")
                done[action] += len(mine)
        ledger.check()
        assert {p for first, count in ledger.free for p in range(first, first + count)} == free
        assert ledger.next_position == new
        assert (ledger.applied, ledger.discarded) == (done["apply"], done["discard"])


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), max_size=30))
def test_a_log_that_is_told_in_any_order_never_has_a_gap(pieces):
    log, known = Log(0), 0
    for first, count in pieces:
        log.extend(first, list(range(first, first + count)))  # entry i is the number i
        if first <= known + 1:
            known = max(known, first + count - 1)
        assert log.between(0, log.end) == tuple(range(1, known + 1))


def test_a_follower_is_sent_what_is_new_and_again_what_it_did_not_acknowledge():
    log, follower = Log(10), Follower(10)
    for entry in range(11, 15):
        log.append(entry)
    assert follower.unsent(log, 13) == (11, (11, 12, 13))
    assert follower.unsent(log, 13) is None
    follower.have(12)
    follower.again()
    log.trim(12)
    assert follower.unsent(log, 14) == (13, (13, 14))


def test_pace_knows_a_straggler_by_the_median_of_the_others():
    pace, active = Pace(patience=30.0), ["worker-0", "worker-1", "worker-2"]
    for worker, seconds in zip(active, (1.0, 2.0, 12.0), strict=True):
        pace.note(worker, 1, 99.0, 10, 10)  # programs are compiled
        assert not pace.is_straggler(worker, (2, 10), 0.0, 1.5, active)
        pace.note(worker, 2, seconds, 10, 10)
    assert [pace.is_straggler(worker, None, 0.0, 5.0, active) for worker in active] == [False, False, True]
    assert pace.is_straggler("worker-0", (3, 10), 10.1, 5.0, active), "it has not answered for so long"
    assert not pace.is_straggler("worker-0", (3, 10), 9.9, 5.0, active)
    assert [pace.share(worker, active) for worker in active] == pytest.approx([1.0, 1 / 2, 1 / 12])
    assert not pace.is_straggler("worker-2", None, 0.0, 5.0, ["worker-1", "worker-2"]), "nobody to compare with"


@pytest.mark.parametrize(("compiling", "limit"), [(20.0, 60.0), (1.0, 30.0)])
def test_the_first_piece_of_a_process_is_compared_with_the_longest_first_of_the_others(compiling, limit):
    """All may be compiling: that takes no less than the patience."""
    pace, active = Pace(patience=30.0), ["worker-0", "worker-1", "worker-2"]
    pace.note("worker-1", 1, compiling, 10, 10)
    assert not pace.is_straggler("worker-0", (1, 10), 1e9, 3.0, active), "one does not say what is usual"
    pace.note("worker-2", 1, compiling / 2, 10, 10)
    assert not pace.is_straggler("worker-0", (1, 10), limit - 0.1, 3.0, active)
    assert pace.is_straggler("worker-0", (1, 10), limit + 0.1, 3.0, active)


def test_a_lead_that_has_taken_over_compares_with_what_it_sees():
    pace, active = Pace(patience=3.0), ["worker-0", "worker-1", "worker-2"]
    for worker in active[1:]:
        pace.note(worker, 7, 1.0, 10, 10)
    assert [pace.is_straggler("worker-0", (7, 10), since, 5.0, active) for since in (4.9, 5.1)] == [False, True]


@pytest.mark.parametrize(
    ("given", "push", "kept"), [(64, 1 << 40, 64), (None, 1, 256), (None, 1 << 27, 32), (None, 1 << 40, 8)]
)
def test_as_many_pushes_are_kept_as_memory_allows(given, push, kept):
    assert replay_window(given, push) == kept
