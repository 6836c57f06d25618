"""From a cohort to virtual lanes: which client runs where, in an order that no number of devices changes.

A device takes neighbouring lanes. The lanes are numbered so that for 1, 2, 4, ... devices the loads of all are about
alike.
"""

import heapq

import numpy as np


def slots_per_lane(cohort_size: int, num_lanes: int) -> int:
    """At most so many clients run in one lane: one more than if all were alike, so that small ones can fill up."""
    return -(-cohort_size // num_lanes) + (cohort_size > num_lanes)


def assign(loads: np.ndarray, num_lanes: int, most: int) -> np.ndarray:
    """The slot (lane * most + place in it) of each client, int64 [n].

    Longest first, each to the lane with the least to do that has room (Graham 1969).
    """
    assert len(loads) <= num_lanes * most, (len(loads), num_lanes, most)
    lane = np.empty(len(loads), np.int64)
    place = np.empty(len(loads), np.int64)
    filled, total = [0] * num_lanes, [0] * num_lanes
    least = [(0, i) for i in range(num_lanes)]
    for client in np.argsort(-loads, kind="stable").tolist():
        _, i = heapq.heappop(least)
        lane[client], place[client] = i, filled[i]
        filled[i] += 1
        total[i] += int(loads[client])
        if filled[i] < most:
            heapq.heappush(least, (total[i], i))
    number = np.empty(num_lanes, np.int64)
    number[fold(total)] = np.arange(num_lanes)
    return number[lane] * most + place


def fold(loads: list[int]) -> list[int]:
    """An order of lanes in which neighbours, and neighbours of such pairs, are about alike: the one with most to do
    beside the one with least, again and again."""
    groups = [(load, [i]) for i, load in enumerate(loads)]
    while len(groups) > 1 and len(groups) % 2 == 0:
        groups.sort(key=lambda group: (-group[0], group[1]))
        half = len(groups) // 2
        groups = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(groups[:half], reversed(groups[half:]), strict=True)]
    return [i for _, lanes in groups for i in lanes]
