"""The whole run in one process, in virtual time: real numbers, real messages, a simulated network."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jaxdist.config.simulate import Link
from jaxdist.parameter_server.contracts import Note, Snapshot, Work
from jaxdist.parameter_server.coordinator import resumed_from
from jaxdist.parameter_server.disk import CheckpointDisk
from jaxdist.parameter_server.recording import Recording, metrics_of
from jaxdist.parameter_server.roles import num_servers
from jaxdist.parameter_server.simulated import SimulatedRun
from jaxdist.parameter_server.traffic import link_of
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.simulate.cluster import Cluster, build_cluster
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.network import Network, Route, cluster_links, equal_links

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import Parameters, ParameterServerStrategy

WORK_SECONDS = 1.0  # of a piece of work, where nothing says how fast devices are
LINK = Link(bandwidth=1.25e9, latency=1e-4)  # between all nodes then: 10 Gbit/s


def run(strategy: "ParameterServerStrategy", state: "Parameters", runtime: Runtime) -> Iterator[Record]:
    """Coordinator, servers and workers. Raises UserError where the simulated cluster does not fit the workers."""
    plan, version = strategy.plan, int(state.step)
    config, rules = plan.config, plan.rules
    cluster = None if config.simulate is None else build_cluster(config.simulate, rules.num_workers)
    recording = Recording(strategy, runtime, version)
    disk = CheckpointDisk(
        runtime.checkpointer,
        secrets.token_hex(8),
        lambda shard: plan.store(shard, state.params, state.model_state),
        lambda: (recording.meta(), metrics_of(recording.last)),
    )
    memory = disk.persisted()
    if version and (memory is None or memory["finished"] or memory["cut"] != version):
        disk.persist(resumed_from(version, rules.num_shards))
    elif not version and memory is not None:
        disk.forget()
    snapshots: list[Snapshot] = []
    servers = num_servers(plan.strategy)
    simulated = SimulatedRun(
        rules,
        lambda shard: plan.store(shard, state.params, state.model_state),
        lambda worker: plan.computer(),
        _compute_seconds(strategy, cluster),
        Network(Simulation(config.seed), _route(cluster, rules.num_workers, servers)),
        num_servers=servers,
        disk=disk,
        on_note=lambda time, node, note: _note(recording, time, node, note),
        on_snapshot=snapshots.append,
    )
    runtime.stop.nothing_to_save = False

    def records(last: bool = False) -> Iterator[Record]:
        sent = _by_link(simulated.network.bytes_sent)
        record = recording.record(sent, sent, virtual_seconds=simulated.simulation.now, last=last)
        yield from [] if record is None else [record]
        while snapshots:
            snapshot = snapshots.pop(0)
            with runtime.stopwatch("eval"):
                means = strategy.evaluate(*strategy.whole(snapshot.parts), config.train.eval_samples)
            yield recording.evaluation(snapshot.version, means)

    with runtime.stopwatch("step"):
        for fields in simulated.run():
            seconds = fields["virtual_seconds"]
            recording.hear(fields)
            for record in records():
                yield record
                if recording.ended is None and recording.reached(record):
                    recording.ended = "target"
                    simulated.stop(DONE)
            budget = config.train.budget.seconds
            if recording.ended is None and (runtime.stop.requested or (budget is not None and seconds >= budget)):
                recording.ended = "signal" if runtime.stop.requested else "budget"
                simulated.stop(RESTARTABLE if runtime.stop.requested else DONE)
        yield from records(last=True)
    end = simulated.ended["coordinator"]
    if end.code not in (DONE, RESTARTABLE):
        raise TrainingStopped(end.reason)
    recording.finish()


def _note(recording: Recording, time: float, node: str, note: Note) -> None:
    recording.note(Note(note.kind, {**note.fields, "node": node, "virtual_seconds": round(time, 6)}))


def _compute_seconds(strategy: "ParameterServerStrategy", cluster: Cluster | None) -> Callable[[int, Work], float]:
    """Of a worker's number and a piece of work."""
    rules, seed = strategy.plan.rules, strategy.plan.config.seed

    def seconds(worker: int, work: Work) -> float:
        samples = sum(count for _, count in work.ranges)
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
