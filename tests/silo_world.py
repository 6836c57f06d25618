"""Silos and their server on a simulated network, with numbers that say where they come from."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxdist.config.simulate import Link
from jaxdist.federated.secure_aggregation.rules import Rules as SumRules
from jaxdist.federated.silos.messages import NEVER, Message, Secure
from jaxdist.federated.silos.rules import Close, Opened, Rules, Trained, Work
from jaxdist.federated.silos.server import Server
from jaxdist.federated.silos.silo import Silo, SiloRules
from jaxdist.runtime.exit_codes import DONE, FAILED
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.faults import Fault, Processes
from jaxdist.simulate.network import Disturbance, Network, equal_links
from jaxdist.transport.machine import End, Note, Send, SetTimer
from jaxdist.transport.plain import from_plain, to_plain

RUN = "run"
LENGTH = 5  # words of a vector


def vector(client: int, round_: int) -> np.ndarray:
    """What a client adds to a round's sum: uint32 [LENGTH]."""
    return np.random.default_rng([client, round_]).integers(0, 1000, LENGTH, "uint32")


class World:
    """`history`: of the server's rounds that were made, (round, who counted), as its last process knows it. A silo's
    own state is the list of rounds in which it was counted."""

    def __init__(
        self,
        num_silos: int,
        rounds: int,
        *,
        cohort: Callable[[int], tuple[int, ...]] | None = None,
        min_silos: int = 1,
        sums: SumRules | None = None,
        seed: int = 0,
        disturbances: tuple[Disturbance, ...] = (),
        faults: tuple[Fault, ...] = (),
        train_seconds: Callable[[int], float] = lambda client: 1.0,
        save_every: int = 3,
        deadline: float = 20.0,
        identity: Callable[[int], str] = lambda client: "config",
        keeps_own: bool = True,
        silent_from: dict[str, str] | None = None,
    ):
        """`silent_from`: of a silo, the first message of secure aggregation that is lost, and all after it."""
        everybody = tuple(range(num_silos))
        self.rounds, self.cohort = rounds, cohort or (lambda round_: everybody)
        self.rules = Rules("config", num_silos, min_silos, deadline, lease=5.0, sums=sums)
        self.history: list[tuple[int, tuple[int, ...]]] = []
        self.saved: list[list[tuple[int, tuple[int, ...]]]] = [[]]  # as checkpoints
        self.own: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)  # of each silo's disk, by round
        self.given_out: set[tuple[int, int]] = set()  # on silos' disks: (client, round) whose vectors were
        self.masked: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)  # (epoch, attempt) by that
        self.seen: list[tuple[int, int, np.ndarray]] = []  # masked vectors: client, round
        self.notes: list[tuple[str, Note]] = []
        self.ended: dict[str, End] = {}
        self.trained: Counter[tuple[int, int]] = Counter()
        self.machines: dict[str, Any] = {}
        self.closed_at: dict[int, float] = {}
        self._identity, self._seconds = identity, train_seconds
        self._save_every, self._keeps_own = save_every, keeps_own
        self._silent_from, self._silent = silent_from or {}, set[str]()
        self._timers: dict[tuple[str, str], SetTimer] = {}
        self.simulation = Simulation(seed)
        self.network = Network(self.simulation, equal_links(Link(bandwidth=1e9, latency=0.001)), disturbances)
        self.processes = Processes(self.simulation, self._start, faults)
        self.names = ["server", *(f"silo-{i}" for i in everybody)]
        for name in self.names:
            self.simulation.at(0.0, partial(self.processes.start, name))

    def run(self, until: float = 2000.0) -> "World":
        while (time := self.simulation.next_time) is not None and time <= until and "server" not in self.ended:
            self.simulation.step()
        return self

    def call(self, node: str, method: str, *arguments: Any) -> None:
        effects = getattr(self.machines[node], method)(*arguments, self.simulation.now)
        crashing = self.processes.is_crashing(node)
        if crashing:
            effects = effects[: self.simulation.draws(node, "crash").integers(len(effects) + 1)]
        for effect in effects:
            self._carry_out(node, effect)
        if crashing:
            self.processes.end(node)

    def _start(self, node: str) -> None:
        life = self.processes.life(node)
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != node}
        self.ended.pop(node, None)
        if node == "server":
            self.history = list(self.saved[-1])
            self.machines[node] = Server(self.rules, epoch=life)
            self.call(node, "start")
            self._begin()
            return
        client = int(node.partition("-")[2])
        if not self._keeps_own and life > 1:
            self.own.pop(client, None)
        rules = SiloRules(self._identity(client), sums=self.rules.sums)
        self.machines[node] = Silo(node, f"{node} {life}", rules)
        self.call(node, "start")

    def _begin(self) -> None:
        round_ = len(self.history)
        if round_ == self.rounds:
            self.call("server", "finish", DONE, "budget")
            return
        after = last_counted(self.history)
        keep = {
            client: tuple({last_counted(saved).get(client, NEVER) for saved in self.saved[-2:]}) for client in after
        }
        opened = Opened(RUN, round_, self.cohort(round_), (np.array([round_]),), after, keep)
        self.call("server", "begin", opened)

    def _carry_out(self, node: str, effect: Any) -> None:
        match effect:
            case Send(to=to, message=message):
                self._send(node, to, message)
            case SetTimer():
                self._timers[node, effect.name] = effect
                self._later(effect.at - self.simulation.now, node, partial(self._wake, node, effect))
            case Work():
                client = int(node.partition("-")[2])
                self._later(self._seconds(client), node, partial(self._train, node, client, effect))
            case Close():
                self._later(0.1, node, partial(self._close, effect))
            case Note():
                self.notes.append((node, effect))
            case End():
                self.ended[node] = effect
                self.processes.end(node)
                if effect.code == FAILED:
                    self.simulation.after(1.0, partial(self.processes.start, node))

    def _later(self, seconds: float, node: str, happen: Callable[[], None]) -> None:
        life = self.processes.life(node)
        self.simulation.after(seconds, lambda: self.processes.reach(node, happen, life))

    def _send(self, node: str, to: str, message: Any) -> None:
        header = json.dumps(to_plain(message))
        arrays = getattr(message, "arrays", ())
        if isinstance(message, Secure) and message.said["kind"] == self._silent_from.get(node):
            self._silent.add(node)
        if node in self._silent:
            return
        if isinstance(message, Secure) and message.said["kind"] == "Masked":
            client = int(node.partition("-")[2])
            self.masked[client, message.round].add((message.epoch, message.attempt))
            self.seen.append((client, message.round, arrays[0]))

        def receive() -> None:
            self.simulation.record(node, to, header.encode())
            self.call(to, "receive", node, from_plain(json.loads(header), arrays, Message))

        size = len(header) + sum(array.nbytes for array in arrays)
        self.network.send(node, to, size, lambda: self.processes.reach(to, receive))

    def _wake(self, node: str, timer: SetTimer) -> None:
        if self._timers.get((node, timer.name)) is timer:
            del self._timers[node, timer.name]
            self.call(node, "wake", timer.name)

    def _train(self, node: str, client: int, work: Work) -> None:
        assert work.arrays[0].tolist() == [work.round]
        self.trained[client, work.round] += 1
        if self.rules.sums is not None:
            fresh = (client, work.round) not in self.given_out
            self.given_out.add((client, work.round))
            result = Trained((vector(client, work.round),) if fresh else ())
        else:
            disk = self.own[client]
            before = disk.get(work.after, ()) if work.after != NEVER else ()
            for old in disk.keys() - {*work.keep, work.after}:
                del disk[old]
            disk[work.round] = (*before, work.round)
            result = Trained((np.array([client, work.round, work.epoch]), np.array(before, int)))
        self.call(node, "trained", work, result)

    def _close(self, close: Close) -> None:
        """The laws of a round, and the next one."""
        epoch, round_ = self.machines["server"].epoch, len(self.history)
        assert close.round == round_
        if close.total is not None:
            who = close.total.clients
            expected = sum((vector(client, round_) for client in who), np.zeros(LENGTH, "uint32"))
            np.testing.assert_array_equal(close.total.total, expected)
        else:
            who = tuple(close.updates)
            for client, update in close.updates.items():
                assert update.arrays[0].tolist() == [client, round_, epoch]
                counted = tuple(r for r, came in self.history if client in came)
                assert update.arrays[1].tolist() == list(counted), "its own state is of other rounds"
        missing = [client for client in self.cohort(round_) if client not in who]
        if missing and who:
            assert [n.fields for _, n in self.notes if n.kind == "left_out"][-1] == {
                "round": round_,
                "silos": missing,
            }
        assert set(who) <= set(self.cohort(round_))
        self.history.append((round_, who))
        self.closed_at[round_] = self.simulation.now
        if len(self.history) % self._save_every == 0:
            self.saved.append(list(self.history))
        self._begin()

    def noted(self, kind: str) -> list[dict[str, Any]]:
        return [note.fields for _, note in self.notes if note.kind == kind]


def last_counted(history: list[tuple[int, tuple[int, ...]]]) -> dict[int, int]:
    last: dict[int, int] = {}
    for round_, who in history:
        last |= dict.fromkeys(who, round_)
    return last


def sum_rules(num_clients: int) -> SumRules:
    """Two thirds of all must stay."""
    return SumRules(num_clients, math.ceil(2 / 3 * num_clients), num_clients - 1, LENGTH)
