"""What silos and their server compute, without a network between them: the bits of the simulation."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.silos.roles import Place
from jaxdist.federated.silos.rules import Work
from jaxdist.federated.silos.strategy import ServerStrategy, SiloStrategy, build
from jaxdist.federated.silos.training import pack
from jaxdist.federated.strategy import build as build_simulation
from jaxdist.models.build import build_task
from jaxdist.runtime.topology import Topology

RUN, NUM_SILOS = "0123456789abcdef", 3
CONFIG: dict[str, Any] = {
    "name": "silos",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {
        "kind": "digits",
        "partition": {"clients": NUM_SILOS, "labels": {"kind": "dirichlet", "alpha": 0.5}, "min_samples": 20},
    },
    "optimizer": {"kind": "momentum", "learning_rate": 0.1, "momentum": 0.5},
    "train": {"budget": {"rounds": 3}},
    "strategy": {"kind": "federated", "worker_batch_size": 64, "lanes": 2, "silos": {}},
}


class InOneProcess:
    """A server and all silos; every round is of whoever is named."""

    def __init__(self, directory: Path, *overrides: str):
        self.config = load(CONFIG, [f"run.dir={directory / 'run'}", *overrides]).config
        self.data = build_data(self.config.data, self.config.seed)
        self.task = build_task(self.config.model, self.data.info)
        self.topology = Topology(1, 0, jax.devices()[:1])
        built = [self._node("server", 0), *(self._node("silo", i) for i in range(NUM_SILOS))]
        server, *silos = built
        assert isinstance(server, ServerStrategy)
        self.server, self.silos = server, silos
        self.state = server.with_clients_of(server.init_state())
        self.metrics: dict[str, float] = {}
        self.trainings = []
        for silo in silos:
            assert isinstance(silo, SiloStrategy)
            self.trainings.append(silo.training(self._beginning(silo), lambda: None))
        self.last: dict[int, int] = {}  # rounds in which each was counted

    def _node(self, role: str, index: int) -> Any:
        return build(self.config, Place(role, index, "nowhere:1", None), self.topology, self.task, self.data)

    def _beginning(self, silo: SiloStrategy) -> Any:
        def beginning() -> Any:
            state = silo.init_state()
            return state.params, state.model_state

        return beginning

    def work(self, client: int) -> Work:
        trainer, state = self.server.engine.trainer, self.state
        broadcast = trainer.algorithm.broadcast(state.server_state)
        arrays = pack((trainer.shared(state.params), trainer.shared(state.model_state), broadcast))
        return Work(1, RUN, int(state.step), self.last.get(client, -1), (), arrays)

    def round(self, *who: int) -> None:
        answers = {client: self.trainings[client](self.work(client)).arrays for client in who}
        round_ = int(self.state.step)
        self.state, self.metrics = self.sum(answers)
        self.last |= dict.fromkeys(who, round_)

    def sum(self, answers: dict[int, Any]) -> tuple[Any, dict[str, float]]:
        """(the next state, what was measured)."""
        who = sorted(answers)
        if self.server.words is None:
            cohort = self.server.feed.plan.work(int(self.state.step), Cohort(np.array(who)))
            state, metrics = self.server.programs.of_updates(self.state, cohort, answers)
        else:
            words = np.sum([vector for (vector,) in answers.values()], axis=0, dtype=answers[who[0]][0].dtype)
            total = self.server.words.decode(words, len(who))
            state, metrics = self.server.programs.of_total(self.state, total, len(who))
        return state, dict(zip(self.server.engine.names, metrics.tolist(), strict=True))


def simulated(of: InOneProcess, rounds: int) -> tuple[Any, dict[str, float]]:
    strategy = build_simulation(of.config, of.topology, of.task, of.data)
    state, metrics = strategy.with_clients_of(strategy.init_state()), None
    for now in strategy.feed.dispatches(0, rounds):
        state, metrics = strategy.programs.run(now, state, None, strategy.votes(np.zeros(3)))
    return state, dict(zip(strategy.engine.names, np.asarray(metrics).tolist(), strict=False))


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


ALIKE = "data.partition.labels={kind: iid}"  # silos of one size compile one program
SHARED = ("step", "params", "model_state", "server_state", "outer_opt_state", "last_mean")


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "strategy.algorithm.kind=scaffold",
            "strategy.personal=[hidden/0/bias]",
            "strategy.outer_optimizer={kind: adam, learning_rate: 0.01}",
        ),
        (
            "strategy.aggregator={kind: median, clip_norm: 0.5, clip_around: last}",
            "strategy.attack={kind: sign_flip, fraction: 0.4}",
            "strategy.weighting=equal",
            "strategy.local_steps=5",
            ALIKE,
        ),
    ],
    ids=["scaffold", "clipped median"],
)
def test_silos_come_to_the_bits_of_the_simulation(overrides: tuple[str, ...], tmp_path):
    """The server's state, what was measured, and what each client keeps."""
    silos = InOneProcess(tmp_path, *overrides)
    silos.round(0, 1, 2)
    silos.round(0, 1, 2)
    state, metrics = simulated(silos, 2)
    for name in SHARED:
        assert_same(getattr(silos.state, name), getattr(state, name))
    assert silos.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert silos.metrics["client_drift"] == pytest.approx(metrics["client_drift"], rel=1e-4, nan_ok=True)
    for client, training in enumerate(silos.trainings):
        work = silos.work(client)
        disk = training.disk(work)
        kept = jax.tree.map(lambda x, c=client: x[c], state.client_state)
        if jax.tree.leaves(kept):
            assert_same(disk.load(1), kept)


def test_with_secure_aggregation_they_come_to_the_bits_of_the_simulation(tmp_path):
    secure = "{range: 1.0, bits: 20, max_weight: 999, rounding: stochastic}"
    silos = InOneProcess(tmp_path, f"strategy.secure_aggregation={secure}", ALIKE)
    silos.round(0, 1, 2)
    silos.round(0, 1, 2)
    state, metrics = simulated(silos, 2)
    for name in SHARED:
        assert_same(getattr(silos.state, name), getattr(state, name))
    assert silos.metrics["loss"] == pytest.approx(metrics["loss"], rel=0.05)  # of each client's mean, by samples
    vector = silos.trainings[0](silos.work(0)).arrays
    assert silos.trainings[0](silos.work(0)).arrays == ()  # a second time it is not given out
    assert len(vector) == 1


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> InOneProcess:
    """Nothing of it is changed by rounds that are made of it."""
    return InOneProcess(tmp_path_factory.mktemp("fedavg"), "train.on_nonfinite=skip")


def test_a_round_of_some_is_the_mean_of_theirs_weighted_by_samples(fedavg: InOneProcess):
    """FedAvg by hand: x minus the mean of what came."""
    assert fedavg.data.partition is not None
    sizes, before = fedavg.data.partition.sizes, jax.tree.leaves(fedavg.state.params)
    answers = {client: fedavg.trainings[client](fedavg.work(client)).arrays for client in (0, 2)}
    state, metrics = fedavg.sum(answers)
    for i, (x, y) in enumerate(zip(before, jax.tree.leaves(state.params), strict=True)):
        mean = (sizes[0] * answers[0][i] + sizes[2] * answers[2][i]) / (sizes[0] + sizes[2])
        np.testing.assert_allclose(y, x - mean, rtol=1e-5, atol=1e-6)
    assert (metrics["clients"], metrics["nonfinite"]) == (2, 0)


def test_an_update_that_is_not_finite_is_left_out_where_the_policy_says_so(fedavg: InOneProcess):
    answers = {client: fedavg.trainings[client](fedavg.work(client)).arrays for client in (0, 1)}
    alone, _ = fedavg.sum({0: answers[0]})
    state, metrics = fedavg.sum({**answers, 1: (np.full_like(answers[1][0], np.nan), *answers[1][1:])})
    for x, y in zip(*map(jax.tree.leaves, (state.params, alone.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert (metrics["clients"], metrics["nonfinite"]) == (1, 1)


def test_local_noise_is_the_clients_own_and_not_of_the_seed(fedavg: InOneProcess):
    """Of the stated scale, and another each time, where the simulation would draw the same again."""
    privacy = Local(clip=1e6, stddev=0.25)
    training = dataclasses.replace(fedavg.trainings[0], privacy=privacy)
    plain = fedavg.trainings[0](fedavg.work(0)).arrays
    noises = []
    for _ in range(2):
        noisy = training(fedavg.work(0)).arrays
        noises.append(np.concatenate([(a - b).ravel() for a, b in zip(noisy[:-1], plain[:-1], strict=True)]))
    size = len(noises[0])
    for noise in noises:
        assert noise.std() == pytest.approx(0.25, rel=5 / np.sqrt(2 * size))
    assert abs(np.corrcoef(*noises)[0, 1]) < 5 / np.sqrt(size)
