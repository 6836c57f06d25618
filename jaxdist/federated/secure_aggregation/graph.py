"""Who is whose neighbour, and how many neighbours are enough.

With k neighbours each instead of all, a round of n clients costs each O(k), and k grows with log n (Bell et al.
2020).
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxdist.federated.secure_aggregation.masks import keystream

ALL_UP_TO = 32  # clients, among whom everybody is everybody's neighbour unless said otherwise
COLLUDING = DROPPING = 0.1  # of the clients, that `degree_for` reckons with
EXPOSED, STUCK = 2.0**-40, 2.0**-20  # chances in a round that it allows


def neighbours(roster: Sequence[int], seed: bytes, degree: int) -> dict[int, tuple[int, ...]]:
    """Of each client, in ascending order: a ring in an order drawn from `seed`, in which everybody knows the
    degree / 2 next on either side (a Harary graph on a random permutation); all others if those are no more."""
    clients = np.array(sorted(roster))
    if degree >= len(clients) - 1:
        return {int(one): tuple(int(other) for other in clients if other != one) for one in clients}
    order = np.argsort(keystream(seed, len(clients), "uint64"), kind="stable")
    ring = clients[order]
    offsets = [o for o in range(-(degree // 2), degree // 2 + 1) if o]
    known = np.sort(np.stack([np.roll(ring, -o) for o in offsets], axis=1), axis=1)
    return {int(one): tuple(map(int, others)) for one, others in zip(ring, known, strict=True)}


def holders(client: int, neighbourhoods: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Who holds shares of a client's secrets, in the order of the shares: its neighbours and itself."""
    return tuple(sorted((client, *neighbourhoods[client])))


def odds(
    num_clients: int, degree: int, threshold: int, colluding: float = COLLUDING, dropping: float = DROPPING
) -> tuple[float, float]:
    """Chances in one round, bounded from above, (exposed, stuck): that colluding clients and a server that keeps to
    the protocol learn more than the sum, and that those who stay cannot take the masks off. `colluding` and
    `dropping` are shares of the clients, chosen without knowledge of the graph (Bell et al. 2020). Union bounds.

    Exposed: `threshold` colluders are among one client's neighbours, or honest survivors fall into two parts that no
    mask ties, which takes two gaps of degree / 2 others in the ring. Stuck: fewer than `threshold` of one client's
    holders stay.
    """
    others, bad = num_clients - 1, round(colluding * num_clients)
    gone = round(dropping * num_clients)
    too_many = sum(_hypergeometric(others, min(bad, others), degree, i) for i in range(threshold, degree + 1))
    cut_off = 0.0 if degree == others else (bad + gone) / num_clients
    # Of a client that dropped itself one holder fewer is left.
    too_few = sum(_hypergeometric(others, others - gone, degree, i) for i in range(min(threshold, degree + 1)))
    return num_clients * too_many + num_clients**2 / 2 * cut_off**degree, num_clients * too_few


def degree_for(num_clients: int, share: float) -> int:
    """The fewest neighbours for which `odds` are below 2^-40 and 2^-20 with a tenth colluding and a tenth dropping;
    all others of few clients, or where no fewer will do."""
    if num_clients > ALL_UP_TO:
        for degree in range(2, num_clients - 1, 2):
            exposed, stuck = odds(num_clients, degree, threshold_for(degree + 1, share))
            if exposed <= EXPOSED and stuck <= STUCK:
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
