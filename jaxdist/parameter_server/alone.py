"""The whole run in one process, in virtual time: real numbers, real messages, a simulated network."""

import secrets
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxdist.config.simulate import Link
from jaxdist.parameter_server.computer import IslandComputer
from jaxdist.parameter_server.contracts import KeepOwn, Note, SaveOwn, Snapshot, Work
from jaxdist.parameter_server.coordinator import resumed_from
from jaxdist.parameter_server.disk import CheckpointDisk, OwnState, Said
from jaxdist.parameter_server.ledger import num_samples
from jaxdist.parameter_server.recording import Recording, nothing_left
from jaxdist.parameter_server.roles import num_servers
from jaxdist.parameter_server.simulated import SimulatedRun
from jaxdist.parameter_server.traffic import Totals, link_of
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.simulate.cluster import Cluster, build_cluster
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.network import Network, Route, cluster_links, equal_links

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import Parameters, ParameterServerStrategy

WORK_SECONDS = 1.0  # of a piece of work, where nothing says how fast devices are
LINK = Link(bandwidth=1.25e9, latency=1e-4)  # between all nodes then: 10 Gbit/s


def run(strategy: "ParameterServerStrategy", state: "Parameters", runtime: Runtime) -> Generator[Record, None, None]:
    """Coordinator, servers and workers. Raises UserError where the simulated cluster does not fit the workers."""
    version = int(state.step)
    runtime.ended = nothing_left(strategy, runtime, version)
    if runtime.ended is None:
        runtime.stop.nothing_to_save = False
        with runtime.stopwatch("step"):
            yield from _Alone(strategy, state, version, runtime).run()


class _Alone:
    def __init__(
        self, strategy: "ParameterServerStrategy", state: "Parameters", version: int, runtime: Runtime
    ) -> None:
        plan = strategy.plan
        config, rules = plan.config, plan.rules
        self.strategy, self.runtime, self.train, self.version = strategy, runtime, config.train, version
        self.recording = Recording(strategy, runtime, version)
        self.seconds_before = runtime.columns_before.get("virtual_seconds", 0.0)
        cluster = None if config.simulate is None else build_cluster(config.simulate, rules.num_workers)
        disk = CheckpointDisk(
            runtime.checkpointer,
            secrets.token_hex(8),
            lambda shard: plan.store(shard, state.params, state.model_state),
            self._about,
            config.checkpoint.every,
            runtime.event,
        )
        disk.forget()
        if version:
            disk.persist(resumed_from(version, rules.num_shards))
        self.snapshots: list[Snapshot] = []
        self.own: dict[str, OwnState] = {}  # by worker
        servers = num_servers(plan.strategy)
        self.simulated = SimulatedRun(
            rules,
            lambda shard: plan.store(shard, state.params, state.model_state),
            self._computer,
            _compute_seconds(strategy, cluster),
            Network(Simulation(config.seed), _route(cluster, rules.num_workers, servers)),
            num_servers=servers,
            disk=disk,
            on_note=self._note,
            on_snapshot=self.snapshots.append,
            on_own=self._keep_or_save,
        )

    def run(self) -> Generator[Record, None, None]:
        recording, budget = self.recording, self.train.budget.seconds
        for fields in self.simulated.run():
            recording.hear(fields)
            yield from self._records()
            if self.runtime.stop.requested:
                self._stop("signal", RESTARTABLE)
            elif budget is not None and self._seconds() >= budget:
                self._stop("budget", DONE)
        yield from self._records(last=True)
        end = self.simulated.ended["coordinator"]
        if end.code not in (DONE, RESTARTABLE):
            raise TrainingStopped(end.reason)
        recording.finish(end.code)

    def _records(self, last: bool = False) -> Iterator[Record]:
        self._tell_time_and_traffic()
        record = self.recording.record(last=last)
        records = [] if record is None else [record]
        while self.snapshots:
            snapshot = self.snapshots.pop(0)
            with self.runtime.stopwatch("eval"):
                whole = self.strategy.whole(snapshot.parts)
                means = self.strategy.evaluate(*whole, self.train.eval_samples, self._cut_evaluation_short)
            if means is not None:
                records.append(self.recording.evaluation(snapshot.version, means))
        for record in records:
            yield record
            if self.recording.reached(record):
                self._stop("target", DONE)

    def _cut_evaluation_short(self) -> bool:
        self.runtime.stopwatch.moved()
        return self.runtime.stop.requested

    def _stop(self, why: str, code: int) -> None:
        if self.recording.ended is None:
            self.recording.ended = why
            self.simulated.stop(code)

    def _seconds(self) -> float:
        """Virtual, over all attempts."""
        return self.seconds_before + self.simulated.simulation.now

    def _tell_time_and_traffic(self) -> None:
        sent = _by_link(self.simulated.network.bytes_sent)
        self.recording.totals, self.recording.virtual_seconds = Totals(sent, sent, 0.0, 0), self._seconds()

    def _about(self, state: Mapping[str, Any]) -> Said:
        self._tell_time_and_traffic()
        return self.recording.about(state)

    def _note(self, time: float, node: str, note: Note) -> None:
        seconds = round(self.seconds_before + time, 6)
        self.recording.note(Note(note.kind, {**note.fields, "node": node, "virtual_seconds": seconds}))

    def _computer(self, worker: int) -> IslandComputer:
        computer, name = self.strategy.plan.computer(), f"worker-{worker}"
        self.own[name] = OwnState(self.runtime.checkpointer.directory, name)
        kept = self.own[name].load(self.version, computer.abstract_state())
        if kept is not None:
            computer.restore(kept)
        return computer

    def _keep_or_save(self, worker: str, effect: KeepOwn | SaveOwn) -> None:
        computer, own = self.simulated.computers[worker], self.own[worker]
        assert isinstance(computer, IslandComputer)
        if not computer.has_state:
            return
        tree = computer.state(effect.seq)
        if isinstance(effect, KeepOwn):
            own.keep(effect.version, tree)
        elif not own.save(effect.version, tree) and effect.seq:
            lost = Note("own_state_lost", {"version": effect.version, "seq": effect.seq})
            self._note(self.simulated.simulation.now, worker, lost)


def _compute_seconds(strategy: "ParameterServerStrategy", cluster: Cluster | None) -> Callable[[int, Work], float]:
    """Of a worker's number and a piece of work."""
    rules, seed = strategy.plan.rules, strategy.plan.config.seed

    def seconds(worker: int, work: Work) -> float:
        samples = num_samples(work.ranges)
        if cluster is None:
            return WORK_SECONDS * samples / rules.samples_per_push
        return cluster.compute_seconds(worker, strategy.flops_per_sample * samples, work.seq, seed)

    return seconds


def _route(cluster: Cluster | None, num_workers: int, num_servers: int) -> Callable[[str, str], Route]:
    """Workers are the cluster's devices; everybody else stands on the first one's host, with the device of its own
    that a link out of it needs."""
    if cluster is None or cluster.between[0] is None:
        return equal_links(LINK)
    devices = {f"worker-{i}": i for i in range(num_workers)}
    others = ["coordinator", *(f"server-{i}" for i in range(num_servers))]
    links = cluster_links(cluster, devices)
    server = Link(bandwidth=cluster.between[0].bandwidth, latency=cluster.between[0].latency)

    def route(sender: str, receiver: str) -> Route:
        if sender in others and receiver in others:
            return [] if "coordinator" in (sender, receiver) else [(("out of", sender), server)]
        if sender in devices and receiver in devices:
            return links(sender, receiver)
        worker = sender if sender in devices else receiver
        host = cluster.devices[devices[worker]].host
        own = cluster.between[host] or server
        ends = [(("out of host", host), own), (("into", receiver), server)]
        return ends if sender in devices else [(("out of", sender), server), (("into host", host), own)]

    return route


def _by_link(sent: "Counter[tuple[str, str]]") -> dict[str, int]:
    total: Counter[str] = Counter()
    for (sender, receiver), count in sent.items():
        total[link_of(sender, receiver)] += count
    return dict(total)
