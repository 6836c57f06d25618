"""A federation over Flower comes to what the simulation comes to, and what Flower cannot carry is refused."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np
import pytest

from jaxdist import flower
from jaxdist.checkpoint import read
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.federated.flower.rules import check_config, check_loop, client_of
from jaxdist.run import build, run, train
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun, load_run
from jaxdist.telemetry.summary import Stopwatch

EXAMPLE = Path(__file__).parent.parent / "examples" / "flower"
NUM_CLIENTS = 3
CONFIG: dict[str, Any] = {
    "name": "federation",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {
        "kind": "digits",
        "partition": {"clients": NUM_CLIENTS, "labels": {"kind": "dirichlet", "alpha": 0.5}, "min_samples": 20},
    },
    "optimizer": {"kind": "momentum", "learning_rate": 0.1, "momentum": 0.5},
    "train": {"budget": {"rounds": 3}},
    "strategy": {
        "kind": "federated",
        "worker_batch_size": 64,
        "algorithm": {"kind": "scaffold"},
        "clients_per_round": 2,
        "silos": {"round_deadline": 5.0},
    },
    "telemetry": {"log_every": 1, "progress": "none"},
}
SHARED = ("step", "params", "model_state", "server_state", "outer_opt_state", "last_mean")


class InOneProcess:
    """A Grid whose SuperNodes run their ClientApps at once. `contexts`: by node; `breaks`: clients whose ClientApp
    raises in a round, as (round, client)."""

    def __init__(self, app: Any, num_clients: int = NUM_CLIENTS):
        self.app, self.replies, self.breaks = app, dict[str, Any](), set[tuple[int, int]]()
        self.contexts = {100 + i: context(100 + i, i) for i in range(num_clients)}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Any) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Any) -> str:
        from flwr.app import Error, Message

        name = str(uuid4())
        message.metadata.__dict__["_message_id"] = name
        told = dict(message.content.get("round", {}))
        if (told.get("round"), told.get("client")) in self.breaks:
            self.breaks.remove((told["round"], told["client"]))
            self.replies[name] = Message(Error(0, "it broke"), reply_to=message)
        else:
            self.replies[name] = self.app(message, self.contexts[message.metadata.dst_node_id])
        return name

    def pull_messages(self, names: Any) -> list[Any]:
        return [self.replies.pop(name) for name in names if name in self.replies]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        return self.pull_messages(self.push_messages(messages))


def context(node: int, client: int, **run_config: Any) -> Any:
    from flwr.app import Context, RecordDict

    return Context(1, node, {"partition-id": client, "num-partitions": NUM_CLIENTS}, RecordDict(), run_config)


@pytest.fixture
def in_flower() -> None:
    """As inside an app."""
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """The simulation of CONFIG on one device, as a SuperNode has it."""
    pytest.importorskip("flwr")
    of, stopwatch = config(tmp_path_factory.mktemp("simulated")), Stopwatch()
    built = build(of, topology=Topology(1, 0, jax.devices()[:1]))
    with StopFlag() as stop:
        return run(built, stop, stopwatch)


def assert_same_model(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def config(directory: Path, *overrides: str) -> Any:
    return load(CONFIG, [f"run.dir={directory / 'run'}", *overrides]).config


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in load_run(directory).events if event["kind"] == kind]


def test_rounds_over_flower_come_to_the_bits_of_the_simulation(
    in_flower: None, tmp_path: Path, simulated: LoadedRun
) -> None:
    of = config(tmp_path)
    flower.server_app(of)(InOneProcess(flower.client_app(of)), context(1, 0))
    assert_same_model(read(tmp_path / "run"), read(simulated.path))
    own = load_run(tmp_path / "run").records
    assert [record["loss"] for record in own] == [record["loss"] for record in simulated.records]


def test_flowers_own_loop_with_our_strategy_comes_to_the_bits_of_the_simulation(
    in_flower: None, tmp_path: Path, simulated: LoadedRun
) -> None:
    of = config(tmp_path)
    strategy = flower.strategy(of)
    result = strategy.start(
        InOneProcess(flower.client_app(of)), strategy.initial_arrays, 3, evaluate_fn=strategy.evaluate
    )
    assert_same_model(strategy.state.params, read(simulated.path))
    last = simulated.records[-1]
    assert dict(result.train_metrics_clientapp[3])["loss"] == last["loss"]
    assert dict(result.evaluate_metrics_serverapp[3])["accuracy"] == pytest.approx(last["eval.accuracy"])


def test_a_client_that_fails_is_left_out_and_asked_again_where_too_few_answer(
    in_flower: None, tmp_path: Path
) -> None:
    of = config(tmp_path, "strategy.silos={round_deadline: 1.0, min_silos: 2}", "strategy.clients_per_round=3")
    grid = InOneProcess(flower.client_app(of))
    grid.breaks = {(0, 1), (1, 1), (1, 2)}
    flower.server_app(of)(grid, context(1, 0))
    assert [event["silos"] for event in events(tmp_path / "run", "left_out")] == [[1]]  # in round 0
    assert [record["clients"] for record in load_run(tmp_path / "run").records] == [2, 3, 3]
    assert [(e["round"], e["silo"]) for e in events(tmp_path / "run", "failed")] == [(0, 1), (1, 1), (1, 2)]


def test_a_supernode_of_another_config_has_no_part_and_a_new_one_takes_its_place(
    in_flower: None, tmp_path: Path
) -> None:
    from jaxdist.federated.flower.roster import Roster
    from jaxdist.federated.silos.roles import identity

    of, said = config(tmp_path), list[tuple[str, dict[str, Any]]]()
    grid = InOneProcess(flower.client_app(of))
    grid.contexts[101] = context(101, 1, overrides="seed=4")
    grid.contexts[102] = context(102, 7)
    roster = Roster(identity(of), NUM_CLIENTS, lambda kind, **fields: said.append((kind, fields)))
    roster.look(grid)
    assert roster.nodes == {0: 100}
    reasons = [fields["reason"] for kind, fields in said if kind == "refused"]
    assert any("another config" in reason for reason in reasons)
    assert any("numbered from 0 to 2" in reason for reason in reasons)
    grid.contexts = {103: context(103, 1), 104: context(104, 0), 100: grid.contexts[100]}
    roster.look(grid)
    assert roster.nodes == {0: 104, 1: 103}


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("strategy.silos=null", "give silos"),
        ("strategy.silos.lease=3.0", "SuperLink decides"),
        ("strategy.silos.transport={host: 0.0.0.0, insecure: true}", "addresses and certificates of their own"),
        (
            "strategy={kind: federated, algorithm: {kind: fedavg}, clients_per_round: 3, "
            "secure_aggregation: {range: 4.0, bits: 20, max_weight: 2000}}",
            "four phases",
        ),
        (
            "strategy={kind: federated, algorithm: {kind: fedavg}, clients_per_round: null, "
            "asynchronous: {kind: fedbuff, concurrency: 2, buffer: 1}}",
            "silos take part in rounds",
        ),
        ("strategy.availability={dropout: 0.1}", "come and go by themselves"),
        ("gradient_compression.up.kind=int8", "as they are"),
        (
            "strategy={kind: federated, silos: {}, privacy: {kind: central, clip: 1.0, noise_multiplier: 1.0}}",
            "local",
        ),
    ],
)
def test_what_flower_cannot_carry_is_refused_with_the_reason(override: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_config(load(CONFIG, [override]).config)


def test_the_example_is_what_the_page_shows_and_flower_can_carry_it() -> None:
    page = (EXAMPLE.parent.parent / "docs" / "flower.md").read_text()
    _, _, code = (EXAMPLE / "app.py").read_text().partition("\n\n")
    assert f"```python\n{code}```" in page
    of = load(EXAMPLE / "federation.yaml").config
    check_config(of)
    assert [client_of(of, {"partition-id": i, "num-partitions": 2}) for i in range(2)] == [0, 1]


def test_flowers_own_loop_refuses_what_only_a_recorded_run_has() -> None:
    with pytest.raises(UserError, match=r"train\.eval_every.*\n.*checkpoint\.every"):
        check_loop(load(CONFIG, ["train.eval_every=2", "checkpoint.every=2"]).config)
    with pytest.raises(UserError, match="counts rounds"):
        check_loop(load(CONFIG, ["train.budget={seconds: 3}"]).config)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "does not say which client"),
        ({"partition-id": 3}, "numbered from 0 to 2"),
        ({"partition-id": "0"}, "numbered from 0 to 2"),
        ({"partition-id": 0, "num-partitions": 10}, "as many SuperNodes"),
    ],
)
def test_a_supernode_says_which_client_it_is(said: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        client_of(load(CONFIG).config, said)


def test_without_flower_the_apps_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "flwr" else found(name))
    for make in (flower.client_app, flower.server_app, flower.strategy):
        with pytest.raises(UserError, match=r"jaxdist\[flower\]"):
            make(CONFIG)


def test_bfloat16_travels(in_flower: None) -> None:
    from jaxdist.federated.flower.messages import from_records, to_records

    sent = (np.asarray(jax.numpy.arange(3, dtype="bfloat16")), np.ones((), np.float32))
    came = from_records(to_records(sent), [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sent])
    assert [x.dtype for x in came] == [x.dtype for x in sent]
    assert_same_model(came, sent)
    with pytest.raises(ValueError, match="expected"):
        from_records(to_records(sent), [jax.ShapeDtypeStruct((4,), "float32")] * 2)


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a real SuperLink and two SuperNodes on loopback, and of `flwr run`."""
    pytest.importorskip("flwr")
    programs = str(Path(sys.executable).parent)
    environ = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(EXAMPLE.parent.parent),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    link, *nodes = free_ports(3)
    address = f"127.0.0.1:{link}"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    supernode = ["flower-supernode", "--insecure", "--superlink", address]
    commands = [
        ["flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"],
        *(
            [*supernode, "--port", str(port), "--node-config", f"partition-id={i} num-partitions=2"]
            for i, port in enumerate(nodes)
        ),
    ]
    processes = []
    try:
        for i, command in enumerate(commands):
            where = tmp_path / str(i)
            where.mkdir()
            with (where / "log").open("w") as log:
                processes.append(subprocess.Popen(command, cwd=where, env=environ, stdout=log, stderr=log))
            if i == 0:
                wait_for(link)
        yield environ
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(port: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < until, "the SuperLink does not listen"
            time.sleep(0.2)


@pytest.mark.processes
def test_a_real_superlink_and_supernodes_come_to_the_bits_of_the_simulation(
    superlink: dict[str, str], tmp_path: Path
) -> None:
    two = "train.budget.rounds=2"
    command = ["flwr", "run", str(EXAMPLE), "here", "--stream", "--run-config", f'overrides="{two}"']
    done = subprocess.run(
        command, check=False, env=superlink, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    ran = tmp_path / "0" / "runs" / "federation"
    assert (ran / "summary.json").is_file(), done.stdout[-6000:] + (tmp_path / "0" / "log").read_text()[-6000:]
    train(EXAMPLE / "federation.yaml", [two, f"run.dir={tmp_path / 'simulated'}"])
    assert_same_model(read(ran), read(tmp_path / "simulated"))
