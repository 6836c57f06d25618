"""Who is whose neighbour, and how many neighbours are enough.

With k neighbours each instead of all, a round of n clients costs each O(k), and k grows with log n (Bell et al.
2020).
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.federated.secure_aggregation.masks import keystream

ALL_UP_TO = 32  # clients, among whom everybody is everybody's neighbour unless said otherwise
COLLUDING = DROPPING = 0.1  # of the clients, that `degree_for` reckons with
EXPOSED, STUCK = 2.0**-40, 2.0**-20  # chances in a round that it allows


def neighbours(roster: Sequence[int], seed: bytes, degree: int) -> dict[int, tuple[int, ...]]:
    """Of each client, in ascending order: a ring in an order drawn from `seed`, in which everybody knows the
    degree / 2 next on either side (a Harary graph on a random permutation); all others if those are no more."""
    if degree >= len(roster) - 1:
        return {one: neighbours_of(one, roster, seed, degree) for one in sorted(roster)}
    ring = _ring(roster, seed)
    known = np.sort(np.stack([np.roll(ring, -o) for o in _offsets(degree)], axis=1), axis=1)
    return {int(one): tuple(map(int, others)) for one, others in zip(ring, known, strict=True)}


def neighbours_of(client: int, roster: Sequence[int], seed: bytes, degree: int) -> tuple[int, ...]:
    """One client's of `neighbours`, without those of all."""
    if degree >= len(roster) - 1:
        return tuple(other for other in sorted(roster) if other != client)
    ring = _ring(roster, seed)
    place = int(np.flatnonzero(ring == client)[0])
    return tuple(sorted(int(ring[(place + o) % len(ring)]) for o in _offsets(degree)))


def _ring(roster: Sequence[int], seed: bytes) -> np.ndarray:
    order = np.argsort(keystream(seed, len(roster), "uint64"), kind="stable")
    return np.array(sorted(roster))[order]


def _offsets(degree: int) -> list[int]:
    return [o for o in range(-(degree // 2), degree // 2 + 1) if o]


def holders(client: int, known: Sequence[int]) -> tuple[int, ...]:
    """Who holds shares of a client's secrets, in the order of the shares: its neighbours and itself."""
    return tuple(sorted((client, *known)))


def least_clients(num_clients: int, threshold: int, num_holders: int) -> int:
    """Of a round, that must stay: as many in proportion as in a neighbourhood, since fewer would make a sum that says
    much of each."""
    return max(2, math.ceil(threshold * num_clients / num_holders))


def exposed(num_clients: int, degree: int, threshold: int, colluding: float = COLLUDING) -> float:
    """The chance in one round, bounded from above, that colluding clients and a server that keeps to the protocol
    learn more than the sum of the others. `colluding` is a share of the clients, which do not know the graph when
    they join; as many drop as a round bears (Bell et al. 2020).

    Union bounds: `threshold` colluders are among one client's neighbours, or honest survivors fall into two parts
    that no mask ties, which takes two gaps of degree / 2 others in the ring.
    """
    others, bad = num_clients - 1, round(colluding * num_clients)
    gone = num_clients - least_clients(num_clients, threshold, degree + 1)
    too_many = sum(_hypergeometric(others, min(bad, others), degree, i) for i in range(threshold, degree + 1))
    cut_off = 0.0 if degree == others else min(1.0, (bad + gone) / num_clients)
    return num_clients * too_many + num_clients**2 / 2 * cut_off**degree


def stuck(num_clients: int, degree: int, threshold: int, dropping: float = DROPPING) -> float:
    """The chance in one round, bounded from above, that fewer than `threshold` of some client's holders stay, so that
    the masks do not come off. `dropping` is a share of the clients, whichever. Union bound."""
    others, gone = num_clients - 1, round(dropping * num_clients)
    # Of a client that dropped itself one holder fewer is left.
    return num_clients * sum(
        _hypergeometric(others, others - gone, degree, i) for i in range(min(threshold, degree + 1))
    )


def degree_for(num_clients: int, share: float) -> int:
    """The fewest neighbours with which, of clients a tenth of which collude, one is `exposed` with a chance below
    2^-40, and with a tenth dropping the round `stuck` with one below 2^-20; all others of few clients, or where no
    fewer will do. Raises UserError where all would not do either."""
    if num_clients <= ALL_UP_TO:
        return num_clients - 1
    if stuck(num_clients, num_clients - 1, threshold_for(num_clients, share)) > STUCK:
        raise UserError(
            f"strategy.secure_aggregation.threshold: {share:g} of a client's neighbours do not stay when a tenth of "
            f"{num_clients} clients drops, however many neighbours it has; lower it, or give `neighbours`"
        )
    for degree in range(2, num_clients - 1, 2):
        threshold = threshold_for(degree + 1, share)
        if exposed(num_clients, degree, threshold) <= EXPOSED and stuck(num_clients, degree, threshold) <= STUCK:
            return degree
    return num_clients - 1


def threshold_for(num_holders: int, share: float) -> int:
    """`share` of the holders, rounded up, at least two and more than half."""
    return max(2, math.ceil(share * num_holders - 1e-9), num_holders // 2 + 1)


def _hypergeometric(total: int, marked: int, drawn: int, hits: int) -> float:
    """The chance of exactly so many marked ones among those drawn."""
    if not max(0, drawn - (total - marked)) <= hits <= min(drawn, marked):
        return 0.0
    return math.exp(_log_choose(marked, hits) + _log_choose(total - marked, drawn - hits) - _log_choose(total, drawn))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
