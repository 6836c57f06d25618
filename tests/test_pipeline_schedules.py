"""Schedules are tables: dependencies, stash and bubble of each, and which blocks each stage gets."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.sync.pipeline.balance import DoesNotFit, partition
from jaxdist.sync.pipeline.check import bubble_formula, check, in_lockstep, rows_of
from jaxdist.sync.pipeline.picture import picture
from jaxdist.sync.pipeline.schedule import EXECUTED, NAMES, Op, table

SIZES = [(S, M, v) for S in (1, 2, 3, 4, 8) for M in (S, 2 * S, 3 * S) for v in (1, 2, 3)]


def tables():
    for name in NAMES:
        for S, M, v in SIZES:
            if v == 1 or name == "interleaved":
                yield name, S, M, v


@pytest.mark.parametrize("name", NAMES)
def test_every_dependency_is_met_and_the_bubble_is_the_formulas(name):
    for _, S, M, v in (found for found in tables() if found[0] == name):
        found = check(table(name, S, M, v), M, v)  # which raises ValueError where one is not met
        assert found.bubble == bubble_formula(name, S, M, v), (name, S, M, v)


def test_bubble_formula_is_that_of_the_papers():
    assert bubble_formula("1f1b", 4, 8) == Fraction(3, 11)
    assert bubble_formula("gpipe", 8, 8) == Fraction(7, 15)
    assert bubble_formula("interleaved", 4, 8, 2) == Fraction(3, 19)
    assert bubble_formula("zb_h1", 8, 8) == Fraction(7, 31)


@pytest.mark.parametrize("M", [1, 5, 7, 13])
def test_one_chunk_takes_any_number_of_microbatches(M):
    for name in ("gpipe", "1f1b"):
        assert check(table(name, 4, M), M).bubble == bubble_formula(name, 4, M)


def test_the_stash_of_1f1b_does_not_grow_with_microbatches_and_that_of_gpipe_does():
    for S in (2, 4, 8):
        for M in (2 * S, 5 * S):
            assert check(table("1f1b", S, M), M).peak_stash == tuple(2 * (S - 1 - s) + 1 for s in range(S))
            assert check(table("gpipe", S, M), M).peak_stash == (M,) * S
            assert max(check(table("zb_h1", S, M), M).peak_stash) == S


def test_interleaved_keeps_what_megatrons_does():
    """Its warm-up has 2 (S - 1 - s) + (v - 1) S forward passes, and one more before the first backward."""
    for S, v in ((2, 2), (4, 2), (4, 3)):
        found = check(table("interleaved", S, 4 * S, v), 4 * S, v)
        assert found.peak_stash == tuple(2 * (S - 1 - s) + (v - 1) * S + 1 for s in range(S))


def test_what_is_executed_is_in_lockstep_and_has_as_many_ticks_of_either_kind():
    for name, S, M, v in tables():
        if name in EXECUTED:
            rows = table(name, S, M, v)
            assert in_lockstep(rows)
            assert len(rows_of(rows, "F")) == len(rows_of(rows, "B")) == v * M + S - 1
        elif S > 1:
            assert not in_lockstep(table(name, S, M))


def test_a_table_that_is_wrong_is_found_out():
    rows = [list(row) for row in table("1f1b", 3, 4)]
    missing = [[None if op == Op("B", 2, 0) else op for op in row] for row in rows]
    twice = [*rows, [Op("F", 0, 0), None, None]]
    early = [*rows[1:], rows[0]]
    for wrong, why in ((missing, "left out"), (twice, "was done"), (early, "needs F")):
        with pytest.raises(ValueError, match=why):
            check(tuple(tuple(row) for row in wrong), 4)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (("interleaved", 4, 6, 2), "multiple of 4 stages; use 4 or 8"),
        (("1f1b", 4, 8, 2), "interleaved has several"),
        (("gpipe", 4, 0, 1), "at least 1"),
    ],
)
def test_numbers_that_a_schedule_cannot_have_are_refused_with_those_it_can(wanted, why):
    with pytest.raises(ValueError, match=why):
        table(*wanted)


def test_the_picture_shows_every_tick_of_every_stage_in_lines_that_fit():
    for name, S, M, v in (("1f1b", 4, 8, 1), ("interleaved", 4, 16, 2), ("zb_h1", 3, 6, 1)):
        rows, lines = table(name, S, M, v), list(picture(table(name, S, M, v), width=80))
        assert max(map(len, lines[:-1])) <= 80  # the last is the legend
        for s in range(S):
            cells = [cell for line in lines if line.startswith(f"stage {s} ") for cell in line.split()[2:]]
            shown = [f"{op.kind}{op.microbatch}" + "abc"[op.chunk] * (v > 1) if op else "." for op in
                     (row[s] for row in rows)]  # fmt: skip
            assert cells == shown


# Balance


def brute_force(costs, parts, first, last, memory, caps):
    """The least possible cost of the most expensive part, by trying all partitions; None where none fits."""
    found = []
    for cuts in itertools.combinations(range(1, len(costs)), parts - 1):
        spans = list(itertools.pairwise((0, *cuts, len(costs))))
        if any(sum(memory[a:b]) > cap for (a, b), cap in zip(spans, caps, strict=True)):
            continue
        own = [sum(costs[a:b]) for a, b in spans]
        own[0] += first
        own[-1] += last
        found.append(max(own))
    return min(found, default=None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(0, 12),
    st.lists(st.integers(1, 5), min_size=8, max_size=8),
    st.lists(st.integers(3, 14), min_size=4, max_size=4),
)
def test_no_partition_has_a_cheaper_most_expensive_part(costs, parts, first, last, memory, caps):
    parts = min(parts, len(costs))
    memory, caps = memory[: len(costs)], caps[:parts]
    wanted = brute_force(costs, parts, first, last, memory, caps)
    if wanted is None:
        with pytest.raises(DoesNotFit):
            partition(costs, parts, first=first, last=last, memory=memory, caps=caps)
        return
    counts = partition(costs, parts, first=first, last=last, memory=memory, caps=caps)
    assert (len(counts), sum(counts)) == (parts, len(costs))
    assert min(counts) >= 1
    ends = [0, *itertools.accumulate(counts)]
    own = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    own[0] += first
    own[-1] += last
    assert max(own) == wanted
    assert all(sum(memory[a:b]) <= cap for (a, b), cap in zip(itertools.pairwise(ends), caps, strict=True))


def test_equal_blocks_are_spread_evenly_and_a_head_counts_for_as_many_as_it_costs():
    assert sorted(partition([1.0] * 10, 4)) == [2, 2, 3, 3]
    assert partition([0.1] * 12, 4) == (3, 3, 3, 3)  # whatever the rounding of their sums
    counts = partition([1.0] * 30, 4, last=6.0)
    assert counts == (9, 9, 9, 3)
    assert math.isclose(max(*counts[:3], counts[3] + 6), 9)


def test_fewer_blocks_than_parts_are_refused():
    with pytest.raises(ValueError, match="3 blocks do not go round 4"):
        partition([1.0] * 3, 4)
