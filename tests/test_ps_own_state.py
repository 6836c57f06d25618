"""What goes on from push to push at a worker, through the protocol: as if what was discarded had not been computed,
held as long as it can be asked for, and saved with the checkpoint that it belongs to."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ps_laws import MeanStore, Quadratics
from ps_world import Counter, World, rules

from jaxdist.config.simulate import Link
from jaxdist.parameter_server.contracts import KeepOwn, Rules, Save, SaveOwn, Work
from jaxdist.parameter_server.disk import OwnState
from jaxdist.parameter_server.messages import View, Welcome
from jaxdist.parameter_server.nodes import _Working
from jaxdist.parameter_server.simulated import SimulatedRun
from jaxdist.run import train
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.network import Network, equal_links


class SlowlySaved(World):
    """Checkpoints take six turns of a worker; the first Decided of each is lost. Looks at what workers are told."""

    def __init__(self, rules: Rules, num_servers: int):
        self.held: dict[str, set[int]] = {}  # by worker: pushes whose state it may not have dropped
        self.own: list[tuple[str, Any]] = []
        super().__init__(rules, num_servers, seconds=lambda worker, work: 1.0 + 0.13 * worker)

    def _carry_out(self, name: str, effect: Any) -> None:
        if isinstance(effect, Save):
            number = len(self.parts)
            self.parts[number] = effect.captured
            self._after(6.0, name, lambda: self.call(name, "saved", effect, {"part": number}))
            return
        if isinstance(effect, KeepOwn | SaveOwn):
            self.own.append((name, effect))
        super()._carry_out(name, effect)
        if work := getattr(effect, "work", None):
            held = {seq for seq in self.held.get(name, {0}) if work.oldest <= seq <= work.after}
            assert work.after in held, "the state that it goes on from was dropped"
            self.held[name] = held | {work.seq}
        if isinstance(effect, KeepOwn):
            assert effect.seq in self.held.get(name, {0}), "the state that is to be saved was dropped"


MODES: list[dict[str, Any]] = [
    {"mode": "async"},
    {"mode": "ksync", "k": 2, "num_workers": 3},
    {"mode": "buffered", "k": 5, "num_workers": 2},
]


@pytest.mark.parametrize("durability", ["memory", "replay", "backup"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["mode"])
def test_a_worker_holds_few_states_and_yet_the_one_of_every_checkpoint(durability: str, mode: dict[str, Any]) -> None:
    plan = rules(
        durability=durability, cut_every=10, budget_versions=40, worker_lease=30.0, server_lease=30.0, **mode
    )
    world = SlowlySaved(plan, num_servers=2)
    world.run()
    assert {end.code for end in world.ended.values()} == {0}
    undecided = plan.k or 0 if plan.mode == "buffered" else 0
    assert max(len(held) for held in world.held.values()) <= 3 + undecided
    kept = {(name, e.version, e.seq) for name, e in world.own if isinstance(e, KeepOwn)}
    saved = {(name, e.version, e.seq) for name, e in world.own if isinstance(e, SaveOwn)}
    for version in world.commits:
        applied = dict.fromkeys((f"worker-{i}" for i in range(plan.num_workers)), 0)
        for of, worker, _, seq, _ in world.primary().history:
            applied[worker] = seq if of <= version else applied[worker]
        own = {(name, version, seq) for name, seq in applied.items()}
        assert own <= kept
        assert {one for one in saved if one[1] == version} == own


def test_work_goes_on_from_the_last_push_that_was_not_discarded() -> None:
    plan = rules(mode="ksync", k=2, num_workers=3, budget_versions=30)
    world = World(plan, seconds=lambda worker, work: (1.0, 1.1, 0.9 if work.clock % 3 else 1.7)[worker]).run()
    discarded = {(fields["worker"], fields["seq"]) for fields in world.noted("discarded")}
    assert "worker-2" in {worker for worker, _ in discarded}
    for _, name, work in world.started:
        before = [seq for seq in range(1, work.seq) if (name, seq) not in discarded]
        assert work.after == max(before, default=0)
    assert any(worker == "worker-2" for _, worker, *_ in world.primary().history)


def test_pushes_of_no_weight_are_discarded_for_what_they_are_and_the_run_goes_on() -> None:
    class Empty(Counter):
        def compute(self, work: Work) -> Any:
            result = super().compute(work)
            return dataclasses.replace(result, weight=0.0) if work.clock % 3 == 1 else result

    world = World(rules(num_workers=1, budget_versions=8))
    world.machines["worker-0"].computer = Empty(1)
    world.run()
    assert {fields["reason"] for fields in world.noted("discarded")} == {"empty"}
    assert world.primary().version == 8
    assert world.commits[8].meta["discarded"] == {"empty": len(world.noted("discarded"))}


def test_a_worker_reads_no_data_in_the_thread_that_keeps_its_lease() -> None:
    class Slow(Counter):
        may = False

        def wants(self, ranges: Any) -> Any:
            assert self.may, "in the machine itself"
            return super().wants(ranges)

    class Aside(World):
        def _carry_out(self, name: str, effect: Any) -> None:
            if name.startswith("worker"):
                self.machines[name].computer.may = True
            super()._carry_out(name, effect)
            if name.startswith("worker"):
                self.machines[name].computer.may = False

    world = Aside(rules(num_workers=2))
    for name in ("worker-0", "worker-1"):
        world.machines[name].computer = Slow(1)
    assert world.run().primary().version == 8


class Remembering:
    has_state = True

    def __init__(self) -> None:
        self.restored: list[Any] = []

    def abstract_state(self) -> Any:
        return {"a": np.zeros(2)}

    def restore(self, state: Any) -> None:
        self.restored.append(state["a"][0])


def test_a_worker_goes_on_from_its_part_of_a_checkpoint_once_when_the_coordinator_says_so(tmp_path: Path) -> None:
    computer, own = Remembering(), OwnState(tmp_path, "worker-0")
    assert own.save(5, {"a": np.full(2, 5.0)})
    working = _Working(SimpleNamespace(plan=SimpleNamespace(computer=lambda: computer)), own)  # type: ignore[arg-type]
    working.machine = SimpleNamespace(nonce="mine 0")
    view = View(1, 1, (), cut=5, first_cut=5)
    working.hear(Welcome("another's 0", 1, view, {}))
    assert computer.restored == []
    for _ in range(2):  # it may be said again, when something was computed
        working.hear(Welcome("mine 0", 1, view, {}))
    assert computer.restored == [5.0]


CONFIG: dict[str, Any] = {
    "name": "own",
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "learning_rate": 0.5},
    "strategy": {"kind": "parameter_server", "workers": 3, "worker_batch_size": 8, "durability": "memory"},
    "gradient_compression": {"up": {"kind": "topk", "ratio": 0.1}, "error_feedback": True},
    "checkpoint": {"every": 5},
    "telemetry": {"log_every": 5, "progress": "none"},
}


@pytest.mark.parametrize("mode", ["async", "ksync"])
def test_every_worker_finds_its_own_part_in_every_checkpoint(tmp_path: Path, mode: str) -> None:
    """Also those that were at work when the run ended."""
    strategy = {**CONFIG["strategy"], "consistency": {"kind": mode}}
    run = train(
        {**CONFIG, "strategy": strategy, "train": {"budget": {"steps": 12}}, "run": {"dir": str(tmp_path / "run")}}
    )
    assert not [event for event in run.events if event["kind"] == "own_state_lost"]
    for worker in range(3):
        found = OwnState(tmp_path / "run" / "checkpoints", f"worker-{worker}")
        assert found.load(12, {"a": 0}) is not None


def test_the_trace_tells_runs_apart_that_differ_in_what_tensors_hold() -> None:
    hashes = []
    for start in (1.0, 1.0, 2.0):
        run = SimulatedRun(
            Rules("async", 1, 2, samples_per_push=4, budget_versions=5),
            lambda shard, start=start: MeanStore(np.full(3, start), 0.1),
            lambda worker: Quadratics(1),
            lambda worker, work: 1.0 + 0.1 * worker,
            Network(Simulation(0), equal_links(Link(bandwidth=1e9, latency=1e-3))),
        )
        list(run.run())
        hashes.append(run.simulation.trace_hash)
    assert hashes[0] == hashes[1] != hashes[2]
