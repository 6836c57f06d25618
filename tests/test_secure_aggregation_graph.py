"""Who is whose neighbour in secure aggregation: the same for all, and so many that no client is laid bare."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from jaxdist.config.errors import UserError
from jaxdist.config.privacy import SecureAggregation
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.graph import (
    degree_for,
    exposed,
    neighbours,
    neighbours_of,
    stuck,
    threshold_for,
)
from jaxdist.federated.secure_aggregation.rules import Rules

LENGTH = 11


@pytest.mark.parametrize(("num_clients", "degree"), [(20, 8), (21, 8), (7, 2), (5, 8)])
def test_the_graph_is_regular_connected_and_the_same_for_all(num_clients, degree):
    roster = range(100, 100 + num_clients)
    graph = neighbours(roster, b"s" * 32, degree)
    assert graph == neighbours(roster[::-1], b"s" * 32, degree)
    assert all(len(known) == min(degree, num_clients - 1) and one not in known for one, known in graph.items())
    assert all(one in graph[other] for one, known in graph.items() for other in known)
    assert all(known == neighbours_of(one, roster, b"s" * 32, degree) for one, known in graph.items())
    reached, edge = {100}, {100}
    while edge:
        edge = {other for one in edge for other in graph[one]} - reached
        reached |= edge
    assert reached == set(roster)
    if degree < num_clients - 1:
        assert graph != neighbours(roster, b"t" * 32, degree)


def test_the_odds_are_scipys_and_the_chosen_degree_is_the_least():
    gone = 1000 - Rules(1000, 27, 40, LENGTH).min_clients
    bare = 1000 * stats.hypergeom(999, 100, 40).sf(26) + 1000**2 / 2 * ((100 + gone) / 1000) ** 40
    assert exposed(1000, 40, 27, colluding=0.1) == pytest.approx(bare, rel=1e-6)
    assert stuck(1000, 40, 27, dropping=0.2) == pytest.approx(1000 * stats.hypergeom(999, 799, 40).cdf(26), rel=1e-6)
    degree = degree_for(1000, 2 / 3)
    assert stuck(1000, degree, threshold_for(degree + 1, 2 / 3)) <= 2**-20
    fewer = degree - 2, threshold_for(degree - 1, 2 / 3)
    assert exposed(1000, *fewer) > 2**-40 or stuck(1000, *fewer) > 2**-20
    assert degree_for(10, 2 / 3) == 9


@pytest.mark.parametrize("num_clients", [33, 50, 100, 1000])
def test_the_chosen_degree_bears_all_the_dropping_that_a_round_bears(num_clients):
    """A client is bare if none of its neighbours is honest and stays; three in ten may go, not one."""
    rules, _ = build_secure_aggregation(SecureAggregation(), num_clients, LENGTH)
    away = round(num_clients / 10) + num_clients - rules.min_clients  # colluding, or dropped
    assert rules.is_complete or num_clients**2 / 2 * (away / num_clients) ** rules.degree <= 2**-40


def test_neighbours_so_few_that_clients_are_laid_bare_are_refused():
    with pytest.raises(UserError, match=rf"neighbours: with 2 of 1000.*leave it out \({degree_for(1000, 2 / 3)}\)"):
        build_secure_aggregation(SecureAggregation(neighbours=2), 1000, LENGTH)
    more = degree_for(1000, 2 / 3) + 10
    assert build_secure_aggregation(SecureAggregation(neighbours=more), 1000, LENGTH)[0].degree == more


def test_a_threshold_that_a_tenth_dropping_never_leaves_is_refused():
    with pytest.raises(UserError, match=r"threshold: 0\.95 of a client's neighbours do not stay"):
        degree_for(1600, 0.95)
    assert degree_for(20, 0.95) == 19  # where one may know who stays


def test_survivors_fall_apart_no_more_often_than_the_odds_say():
    """Every way in which 4 of a ring of 12, with 4 neighbours each, may vanish; threshold 5 leaves this alone."""
    graph, apart = neighbours(range(12), b"s" * 32, 4), 0
    for gone in itertools.combinations(range(12), 4):
        left = set(range(12)) - set(gone)
        reached = edge = {min(left)}
        while edge:
            edge = {other for one in edge for other in graph[one]} & left - reached
            reached = reached | edge
        apart += reached != left
    assert 0 < apart / math.comb(12, 4) <= exposed(12, 4, threshold=5, colluding=4 / 12) < 1


def test_the_odds_of_falling_apart_are_of_the_right_size():
    """A tenth of a ring of 100 vanishes: an exponent that is one off is 10 times off."""
    graph, draw, apart = neighbours(range(100), b"s" * 32, 4), np.random.default_rng(0), 0
    for _ in range(400):
        left = set(range(100)) - set(draw.choice(100, 10, replace=False).tolist())
        reached = edge = {min(left)}
        while edge:
            edge = {other for one in edge for other in graph[one]} & left - reached
            reached = reached | edge
        apart += reached != left
    bound = exposed(100, 4, threshold=5, colluding=0.1)  # all five holders must stay: nobody may drop
    assert bound / 4 < apart / 400 <= bound
