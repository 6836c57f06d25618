"""What a seed stands for: a random job of the parameter server, and what goes wrong in it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from ps_laws import Heard, IntegerComputer, IntegerStore

from jaxdist.config.simulate import Link
from jaxdist.parameter_server.contracts import Rules, Work
from jaxdist.parameter_server.simulated import MemoryDisk, SimulatedRun
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.faults import Crash, Fault, Pareto, Pause, ShiftedExponential, Skew, Speed
from jaxdist.simulate.network import Disturbance, Network, equal_links, partition

STORM = 12.0  # virtual seconds in which things go wrong
PATIENCE = 600.0  # in which the run must have ended
MODES = ("async", "ssp", "bsp", "ksync", "buffered")


@dataclass(frozen=True)
class Scenario:
    seed: int
    rules: Rules
    num_servers: int
    speeds: tuple[Speed, ...]
    faults: tuple[Fault, ...]
    disturbances: tuple[Disturbance, ...]
    disk_seconds: float  # mean
    through_bytes: bool

    def compute_seconds(self, simulation: Simulation, worker: int, work: Work) -> float:
        seconds = self.speeds[worker].draw(simulation.draws(f"worker-{worker}", "speed"))
        return seconds * sum(count for _, count in work.ranges) / self.rules.samples_per_push

    def build(self, disk: MemoryDisk | None = None) -> tuple[SimulatedRun, Heard]:
        """And where its nodes write down what they have to say."""
        heard = Heard()
        simulation = Simulation(self.seed)
        network = Network(simulation, equal_links(Link(bandwidth=1e6, latency=0.005)), self.disturbances)
        run = SimulatedRun(
            self.rules,
            IntegerStore,
            lambda worker: IntegerComputer(self.rules.num_shards, worker, heard.asked),
            partial(self.compute_seconds, simulation),
            network,
            num_servers=self.num_servers,
            disk=disk,
            faults=self.faults,
            disk_seconds=lambda node: simulation.draws(node, "disk").exponential(self.disk_seconds),
            through_bytes=self.through_bytes,
            on_note=lambda time, node, note: heard.notes.append(note),
        )
        return run, heard


def scenario(seed: int, **fixed: object) -> Scenario:
    """`fixed`: of the rules, in place of what the seed would say."""
    draws = np.random.default_rng(seed)
    rules = random_rules(draws, **fixed)
    spare = int(draws.integers(1, rules.num_shards + 2)) if rules.durability == "backup" else 0
    num_servers = rules.num_shards + spare
    return Scenario(
        seed,
        rules,
        num_servers,
        tuple(random_speed(draws) for _ in range(rules.num_workers)),
        random_faults(draws, rules, num_servers),
        (*random_disturbances(draws, rules, num_servers), *late_start(seed, rules)),
        disk_seconds=float(draws.choice([0.01, 0.1, 1.0])),
        through_bytes=seed % 8 == 0,
    )


def random_rules(draws: np.random.Generator, **fixed: object) -> Rules:
    mode = str(draws.choice(MODES))
    mode = str(fixed.get("mode", mode))
    num_workers = int(draws.integers(1, 6))
    samples, budget = int(draws.integers(1, 7)), int(draws.integers(12, 45))
    bound, k = int(draws.integers(0, 4)), int(draws.integers(1, num_workers + 1))
    grace = float(draws.choice([0.0, 0.1]))
    max_delay = int(draws.integers(1, 3 * num_workers)) if draws.random() < 0.4 else None
    by_samples = draws.random() < 0.3 and mode in ("async", "ssp")
    values = {
        "mode": mode,
        "num_workers": num_workers,
        "num_shards": int(draws.integers(1, 4)),
        "samples_per_push": samples,
        "budget_versions": None if by_samples else budget,
        "budget_samples": budget * samples if by_samples else None,
        "bound": bound if mode == "ssp" else None,
        "k": k if mode in ("ksync", "buffered") else None,
        "grace": grace if mode == "ksync" else 0.0,
        "max_delay": max_delay if mode in ("async", "ssp", "buffered") else None,
        "durability": str(draws.choice(["replay", "backup", "memory"], p=[0.45, 0.45, 0.1])),
        "replay_window": int(draws.integers(1, 7)),
        "cut_every": int(draws.integers(3, 12)),
        "keep_every": 5 if draws.random() < 0.3 else None,
        "evict_after": 6.0 if draws.random() < 0.2 else None,
        "proportional_work": bool(draws.random() < 0.2),
        "worker_lease": 3.0,
        "server_lease": 2.0,
        "retry": 0.4,
        "report_every": 1.0,
    }
    return Rules(**{**values, **fixed})


def random_speed(draws: np.random.Generator) -> Speed:
    jitter = draws.choice(np.array([None, ShiftedExponential(0.5), Pareto(2.5)], dtype=object))
    slow = 4.0 if draws.random() < 0.15 else 1.0
    rare = 0.02 if draws.random() < 0.3 else 0.0
    return Speed(float(draws.choice([0.1, 0.3])), slow, jitter, rare, pause_seconds=5.0)


def random_disturbances(draws: np.random.Generator, rules: Rules, num_servers: int) -> tuple[Disturbance, ...]:
    found = []
    if draws.random() < 0.6:
        found.append(
            Disturbance(
                drop=float(draws.choice([0.0, 0.02, 0.2])),
                duplicate=float(draws.choice([0.0, 0.02, 0.2])),
                delayed=float(draws.choice([0.0, 0.05, 0.3])),
                delay=float(draws.choice([0.02, 0.2, 2.0])),
                end=STORM,
            )
        )
    nodes = ["coordinator", *all_servers(num_servers), *all_workers(rules)]
    for _ in range(draws.integers(0, 3)):
        start = float(draws.uniform(0, STORM))
        some = draws.permutation(nodes)[: draws.integers(1, max(2, len(nodes) // 2))]
        others = None if draws.random() < 0.5 else [node for node in nodes if node not in some]
        length = float(draws.choice([0.5, 3.0, 6.0]))
        found += partition(some.tolist(), others, start, min(start + length, STORM), bool(draws.random() < 0.6))
    return tuple(found)


def late_start(seed: int, rules: Rules) -> list[Disturbance]:
    """Of one worker, in one run of four: until then nobody hears of it."""
    draws = np.random.default_rng([seed, 1])
    if draws.random() > 0.25:
        return []
    return partition([str(draws.choice(all_workers(rules)))], None, 0.0, float(draws.choice([0.5, 2.0, 5.0])))


def random_faults(draws: np.random.Generator, rules: Rules, num_servers: int) -> tuple[Fault, ...]:
    """As many as can be survived: processes that crash are replaced, but for workers and servers to spare."""
    faults: list[Fault] = []
    servers, workers = all_servers(num_servers), all_workers(rules)
    # A ready second copy is not given the place of another shard, so each shard must have two to lose one.
    spare = max(0, num_servers - 2 * rules.num_shards + 1)
    dispensable = {"worker": len(workers) - 1, "server": spare, "coordinator": 0}
    gone: set[str] = set()
    for time in np.sort(draws.uniform(0.5, STORM, size=draws.integers(0, 6))).tolist():
        one_server, another, worker = (str(draws.choice(nodes)) for nodes in (servers, servers, workers))
        node = str(draws.choice([one_server, another, worker, "coordinator"]))
        role, restart = node.partition("-")[0], float(draws.choice([0.2, 1.0, 4.0]))
        if draws.random() < 0.15 and dispensable[role] and node not in gone:
            dispensable[role] -= 1
            gone.add(node)
            faults.append(Crash(node, time, None))
        elif node not in gone:
            faults.append(Crash(node, time, restart))
    for _ in range(draws.integers(0, 3)):
        node = str(draws.choice(["coordinator", *servers, *workers]))
        faults.append(Pause(node, float(draws.uniform(0, STORM)), float(draws.choice([0.5, 2.5, 5.0, 10.0]))))
    for node in ["coordinator", *servers, *workers]:
        if draws.random() < 0.2:
            faults.append(Skew(node, float(draws.choice([0.8, 0.97, 1.1, 1.25])), float(draws.uniform(0, 1000))))
    return tuple(faults)


def all_servers(num_servers: int) -> list[str]:
    return [f"server-{i}" for i in range(num_servers)]


def all_workers(rules: Rules) -> list[str]:
    return [f"worker-{i}" for i in range(rules.num_workers)]
