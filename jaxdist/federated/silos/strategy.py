"""The two kinds of processes of a federation as strategies: what a run sees of the server and of a silo."""

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxdist.config.aggregation import Mean
from jaxdist.config.federated import Federated
from jaxdist.config.schema import Config
from jaxdist.config.silos import Silos, num_silos
from jaxdist.data.build import Data
from jaxdist.federated.build_messages import build_privacy
from jaxdist.federated.held_out import training_clients
from jaxdist.federated.loop import VOTES
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.rules import Rules as SumRules
from jaxdist.federated.silos.roles import Place, find_place, identity
from jaxdist.federated.silos.rules import Arrays, Rules
from jaxdist.federated.silos.share import of_server, of_silo
from jaxdist.federated.silos.silo import SiloRules
from jaxdist.federated.silos.summing import Summing, WithoutClients
from jaxdist.federated.silos.training import Training, of_one_client, pack
from jaxdist.federated.silos.words import Words
from jaxdist.federated.state import FederatedState
from jaxdist.federated.strategy import FederatedStrategy
from jaxdist.federated.strategy import build as build_simulation
from jaxdist.federated.whole_numbers import WholeNumbers
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.runtime.topology import Topology
from jaxdist.task import Task
from jaxdist.telemetry.summary import Stopwatch


def place_of(config: Config, environ: Any, process: int, num_processes: int, coordinator: str | None) -> Place | None:
    """Which node this process is; None where the config has no silos, or all are simulated. See `find_place`."""
    count = num_silos(config)
    return None if count is None else find_place(environ, count, process, num_processes, coordinator)


def build(
    config: Config, place: Place, topology: Topology, task: Task, data: Data
) -> "ServerStrategy | SiloStrategy":
    """Raises UserError for what does not fit together, as the simulation does, and for a silo without samples."""
    one_device = dataclasses.replace(topology, devices=list(topology.devices)[:1])
    of_node = _server if place.is_server else _silo
    return of_node(config, place, one_device, task, data)


def _server(config: Config, place: Place, topology: Topology, task: Task, data: Data) -> "ServerStrategy":
    built = build_simulation(config, topology, task, data)
    rules, words = _secure(config, built, built.engine.upload(built.abstract_state()))
    evaluates = of_server(data)
    return ServerStrategy(
        **{
            **_fields(built),
            "engine": WithoutClients(**vars(built.engine)),
            "data": evaluates,
            "client_evaluation": None,
            "feed": dataclasses.replace(built.feed, source=evaluates.train.source),
        },
        place=place,
        silos=_silos(config),
        identity=identity(config),
        sum_rules=rules,
        words=words,
    )


def _silo(config: Config, place: Place, topology: Topology, task: Task, data: Data) -> "SiloStrategy":
    strategy, partition = config.strategy, data.partition
    assert isinstance(strategy, Federated)
    assert partition is not None
    own = of_silo(data, place.index)
    alone = {"silos": None, "clients_per_round": 1, "lanes": 1, "aggregator": Mean(), "privacy": None}
    of_one = strategy.model_copy(update={**alone, "secure_aggregation": None})
    built = build_simulation(config.model_copy(update={"strategy": of_one}), topology, task, own)
    state = built.abstract_state()
    num_clients = len(training_clients(strategy, partition, config.seed))
    privacy, _ = build_privacy(strategy, num_clients=num_clients, num_rounds=None)
    weighs = strategy.weighting == "samples"
    rules, words = _secure(config, built, built.engine.upload(state), num_clients=num_clients)
    return SiloStrategy(
        **{**_fields(built), "engine": of_one_client(built.engine)},
        place=place,
        silos=_silos(config),
        identity=identity(config),
        sum_rules=rules,
        words=words,
        privacy=privacy,  # type: ignore[arg-type]
        weight=int(partition.sizes[place.index]) if weighs else 1,
        download=built.engine.download(state),
        directory=config.run_dir.with_name(f"{config.run_dir.name}.silos") / place.name,
    )


def _fields(strategy: FederatedStrategy) -> dict[str, Any]:
    return {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}


def _silos(config: Config) -> Silos:
    assert isinstance(config.strategy, Federated)
    assert config.strategy.silos is not None
    return config.strategy.silos


def _secure(
    config: Config, built: FederatedStrategy, upload: Any, num_clients: int | None = None
) -> tuple[SumRules | None, Words | None]:
    """Of all silos alike. `num_clients`: of the federation, where `built` is of one alone."""
    strategy = config.strategy
    assert isinstance(strategy, Federated)
    block = strategy.secure_aggregation
    if block is None:
        return None, None
    cohort = strategy.clients_per_round or num_clients or built.feed.plan.max_cohort
    num_measured = 1 + len(built.engine.trainer.metric_names)
    size = sum(x.size for x in jax.tree.leaves(upload)) + num_measured
    rules, quantiser = build_secure_aggregation(block, cohort, size)
    return rules, Words(WholeNumbers(quantiser, rules.min_clients), upload, num_measured, config.seed)


@dataclass(frozen=True, kw_only=True)
class NodeStrategy(FederatedStrategy):
    """One process of a federation; see FederatedStrategy for what it shares with the simulation."""

    place: Place
    silos: Silos
    identity: str
    sum_rules: SumRules | None = None
    words: Words | None = None


@dataclass(frozen=True, kw_only=True)
class ServerStrategy(NodeStrategy):
    """It samples, sums, evaluates and records."""

    records = True

    @cached_property
    def programs(self) -> Any:
        return Summing(self.engine, self.abstract_state(), self._abstract_upload)  # type: ignore[arg-type]

    @property
    def rules(self) -> Rules:
        cohort, silos = self.feed.plan.max_cohort, self.silos
        return Rules(
            identity=self.identity,
            num_silos=self.feed.plan.num_clients,
            min_silos=silos.least(cohort),
            deadline=silos.round_deadline,
            lease=silos.lease,
            sums=self.sum_rules,
        )

    def sent(self, state: FederatedState) -> Arrays:
        """What clients are sent in a round: parameters, statistics, what the algorithm broadcasts."""
        trainer = self.engine.trainer
        broadcast = trainer.algorithm.broadcast(state.server_state)
        return pack((trainer.shared(state.params), trainer.shared(state.model_state), broadcast))

    def lower(self) -> jax.stages.Lowered:
        return self.programs.lower()

    def run(self, state: FederatedState, runtime: Runtime) -> Generator[Record, None, None]:
        from jaxdist.federated.silos.serving import Serving

        if int(state.step) == 0:
            state = self.with_clients_of(state)
        return Serving(self, runtime, int(state.step)).run(state)


@dataclass(frozen=True, kw_only=True)
class SiloStrategy(NodeStrategy):
    """It trains on its own data."""

    privacy: Local | None = None
    weight: int = 1
    download: Any
    directory: Path  # of its own

    records = False

    @property
    def rules(self) -> SiloRules:
        return SiloRules(self.identity, sums=self.sum_rules)

    def training(self, beginning: Callable[[], tuple[Any, Any]], moved: Callable[[], None]) -> Training:
        return Training(
            engine=self.engine,  # type: ignore[arg-type]
            programs=self.programs,  # type: ignore[arg-type]
            feed=self.feed,
            client=self.place.index,
            votes=self.votes([0.0] * len(VOTES)),
            download=self.download,
            beginning=beginning,
            directory=self.directory,
            skips=self.train.on_nonfinite == "skip",
            privacy=self.privacy,
            words=self.words,
            weight=self.weight,
            moved=moved,
        )

    def lower(self) -> jax.stages.Lowered:
        """A round of its client."""
        return self.programs.lower(begins=True, ends=False)  # type: ignore[call-arg]

    def take_part(self, beginning: Callable[[], tuple[Any, Any]], stop: StopFlag, stopwatch: Stopwatch) -> int:
        """Until the run ends: the exit code. `beginning`: parameters and model state that a new run starts from."""
        from jaxdist.federated.silos.taking_part import take_part

        return take_part(self, beginning, stop, stopwatch)
