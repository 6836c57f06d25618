"""Federations of real processes: silos over TCP, hurt in every way, and clients on the mesh of two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxdist.checkpoint import read
from jaxdist.runtime.exit_codes import RESTARTABLE
from jaxdist.telemetry.run_directory import LoadedRun, load_run
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint

ROOT = Path(__file__).parent.parent
NUM_SILOS, NUM_ROUNDS = 3, 300
CONFIG: dict[str, Any] = {
    "name": "silos",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {
        "kind": "digits",
        "partition": {"clients": NUM_SILOS, "labels": {"kind": "dirichlet", "alpha": 0.5}, "min_samples": 20},
    },
    "optimizer": {"kind": "sgd", "learning_rate": 0.05},
    "train": {"budget": {"rounds": NUM_ROUNDS}, "eval_every": 100},
    "strategy": {
        "kind": "federated",
        "worker_batch_size": 32,
        "algorithm": {"kind": "scaffold"},
        "silos": {"round_deadline": 120.0, "min_silos": 2, "lease": 3.0},
    },
    "checkpoint": {"every": 20},
    "telemetry": {"log_every": 1, "progress": "none"},
}

JAXDIST = [sys.executable, "-m", "jaxdist"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

pytestmark = pytest.mark.processes


class Launched:
    """A job, and its processes by the name of their log."""

    def __init__(self, directory: Path, *overrides: str):
        self.run_dir = directory / "run"
        path = directory / "config.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, "run": {"dir": str(self.run_dir)}}))
        command = ["launch", "--max-restarts", "10", "--", "train", str(path), *overrides]
        self.process = subprocess.Popen(
            [*JAXDIST, *command],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, code: int = 0) -> LoadedRun:
        try:
            said = self.process.communicate(timeout=300)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == code, said[-6000:]
        return load_run(self.run_dir)

    def pid(self, name: str) -> int:
        """Of the last process of a node, such as silo-0."""
        log = (self.run_dir / "logs" / f"{name}.log").read_text()
        return int(re.findall(r"process id (\d+)", log)[-1])

    def last(self) -> dict[str, Any]:
        """Line of metrics.jsonl."""
        with suppress(FileNotFoundError, IndexError, ValueError):
            return json.loads((self.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        return {"step": 0}

    def wait_until(self, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Of the last line; returns it."""
        until = time.monotonic() + 180
        while not holds(last := self.last()):
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"did not come to be; {last}; {self.process.communicate()[0][-6000:]}")
            time.sleep(0.05)
        return last

    def wait_for(self, round_: int) -> dict[str, Any]:
        return self.wait_until(lambda last: last["step"] >= round_)

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.pid(name), number)

    def rendezvous(self) -> tuple[str, int]:
        """Where the server is."""
        own = Path(f"/proc/{self.pid('server-0')}/environ").read_bytes().decode().split("\0")
        host, port = next(x for x in own if x.startswith("JAXDIST_RENDEZVOUS=")).partition("=")[2].split(":")
        return host, int(port)

    def stop(self) -> LoadedRun:
        self.process.send_signal(signal.SIGTERM)
        return self.finish(RESTARTABLE)


def assert_same_model(run_dir: Path, other: Path) -> None:
    one, two = read(run_dir), read(other)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stopped_and_gone_on_silos_come_to_the_bits_of_the_simulation(tmp_path):
    """Also with SCAFFOLD, whose clients keep their control variates on their own disks."""
    job = Launched(tmp_path)
    job.wait_for(30)
    with Endpoint("silo-1", Credentials(b"a wrong token, of 32 characters.")) as stranger:
        stranger.connect("server", job.rendezvous())
        job.wait_until(lambda last: last.get("transport.refused", 0) > 0)
    assert job.stop().summary["status"] == "stopped"
    done = Launched(tmp_path).finish()
    assert (done.summary["status"], done.summary["steps"]) == ("done", NUM_ROUNDS)
    assert not [event for event in done.events if event["kind"] == "left_out"]
    alone = [*JAXDIST, "train", str(tmp_path / "config.yaml"), f"run.dir={tmp_path / 'simulated'}"]
    subprocess.run(alone, env=ENVIRONMENT, check=True, timeout=300)
    assert_same_model(tmp_path / "run", tmp_path / "simulated")
    ours, theirs = done.records[-1], load_run(tmp_path / "simulated").records[-1]
    assert ours["eval.accuracy"] > 0.8
    for name in ("eval.loss", "eval.accuracy", "samples", "bytes_sent", "bytes_received"):
        assert ours[name] == theirs[name]


def test_killed_silos_are_left_out_and_come_back_and_a_killed_server_goes_on(tmp_path):
    job = Launched(tmp_path, "train.budget.rounds=1000000")
    job.wait_for(20)
    job.signal("silo-1", signal.SIGSTOP)  # longer than its lease
    alive = job.wait_until(lambda last: last["clients"] == 2)
    assert alive["silos.present"] == 2
    job.signal("silo-1", signal.SIGCONT)
    job.wait_until(lambda last: last["clients"] == 3)
    job.signal("silo-2", signal.SIGKILL)
    job.wait_until(lambda last: last["clients"] == 2)
    again = job.wait_until(lambda last: last["clients"] == 3)
    job.signal("server-0", signal.SIGKILL)
    job.wait_until(lambda last: last["attempt"] == 2 and last["step"] > again["step"] + 20)
    run = job.stop()
    assert {client for e in run.events if e["kind"] == "left_out" for client in e["silos"]} == {1, 2}
    assert sum(event["kind"] == "resume" for event in run.events) == 1
    assert run.metrics["loss"][-1] < run.metrics["loss"][0] / 2


def test_with_secure_aggregation_a_killed_silo_costs_no_round(tmp_path):
    secure = "strategy.secure_aggregation={range: 4.0, bits: 20, max_weight: 2000, threshold: 0.6}"
    changes = ["strategy.algorithm={kind: fedavg}", "strategy.silos.min_silos=null", "train.budget.rounds=1000000"]
    job = Launched(tmp_path, secure, *changes)
    before = job.wait_for(30)
    job.signal("silo-1", signal.SIGKILL)
    job.wait_until(lambda last: last["clients"] == 2)
    job.wait_until(lambda last: last["clients"] == 3)
    run = job.stop()
    assert before["loss"] > run.metrics["loss"][-1]
    assert not [event for event in run.events if event["kind"] == "no_sum"]


def test_over_two_processes_of_jax_a_federation_comes_to_the_bits_of_one(tmp_path):
    """There membership is fixed: the processes are one program."""
    overrides = ["train.budget.rounds=6", "train.eval_every=3", "telemetry.progress=none", "checkpoint.every=6"]
    for processes in (1, 2):
        where = f"run.dir={tmp_path / str(processes)}"
        command = ["launch", "--procs", str(processes), "--", "train", "fed_digits", where, *overrides]
        subprocess.run([*JAXDIST, *command], env=ENVIRONMENT, check=True, timeout=300)
    assert_same_model(tmp_path / "1", tmp_path / "2")
    one, two = (load_run(tmp_path / str(processes)).records for processes in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["loss"], a.get("eval.loss")) == (b["step"], b["loss"], b.get("eval.loss"))
