"""The parameter server as real processes, hurt in every way: what is applied is applied once, and the run ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import counting
import numpy as np
import pytest
import yaml

from jaxdist.checkpoint import Checkpointer, read
from jaxdist.telemetry.run_directory import load_run
from jaxdist.transport.certificates import make_certificates

ROOT = Path(__file__).parent.parent
BATCH = 16
CONFIG: dict[str, Any] = {
    "name": "counted",
    "model": {"target": "counting:task"},
    "data": {"target": "counting:data", "pause": 0.04},
    "optimizer": {"kind": "sgd", "learning_rate": 1.0},
    "train": {"budget": {"samples": 8192}},
    "strategy": {
        "kind": "parameter_server",
        "servers": 2,
        "workers": 3,
        "worker_batch_size": BATCH,
        "consistency": {"kind": "async", "max_delay": "none"},
        "worker_lease": 4.0,
        "server_lease": 3.0,
    },
    "checkpoint": {"every": 25},
    "telemetry": {"log_every": 5, "progress": "none"},
}

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Launched:
    """A job, and its processes by the name of their log."""

    def __init__(self, directory: Path, **changes: Any):
        self.run_dir = directory / "run"
        config = {**CONFIG, **changes, "run": {"dir": str(self.run_dir)}}
        path = directory / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
        self.environment = {name: value for name, value in environment.items() if name != "JAX_NUM_CPU_DEVICES"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxdist", "launch", "--max-restarts", "10", "--", "train", str(path)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, code: int = 0) -> str:
        try:
            said = self.process.communicate(timeout=240)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == code, said[-6000:]
        return said

    def pid(self, name: str) -> int:
        """Of the last process of a node, such as worker-0."""
        log = (self.run_dir / "logs" / f"{name}.log").read_text()
        return int(re.findall(r"process id (\d+)", log)[-1])

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), how)

    def version(self) -> int:
        """Of the last line of metrics.jsonl."""
        with suppress(FileNotFoundError, IndexError, ValueError):
            return json.loads((self.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def wait_for(self, version: int) -> None:
        until = time.monotonic() + 120
        while self.version() < version and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert self.version() >= version, self.finish()


def check_counts(run_dir: Path, batch_size: int = BATCH) -> dict[str, Any]:
    """Each sample was applied as often as the log says, and none twice at one position; the final ledger."""
    checkpoints = Checkpointer(run_dir / "checkpoints")
    found = checkpoints.newest()
    assert found is not None
    ledger = found.meta["parameter_server"]["ledger"]
    counts = counting.applied(read(run_dir), batch_size)
    assert counts.sum() == ledger["applied"]
    positions = np.arange(ledger["next_position"])
    most = np.zeros_like(counts)
    stream = counting.stream()
    np.add.at(most, stream.ids(positions), 1)
    assert (counts <= most).all()
    free = sum(count for _, count in ledger["free"])
    assert ledger["applied"] + ledger["discarded"] + free == ledger["next_position"]
    return ledger


def saved_version(run_dir: Path) -> int:
    found = Checkpointer(run_dir / "checkpoints").newest()
    assert found is not None
    return found.step


def test_every_kind_of_process_is_killed_and_each_sample_is_applied_once(tmp_path):
    job = Launched(tmp_path)
    job.wait_for(30)
    job.kill("worker-1")
    job.wait_for(60)
    job.kill("server-1")
    job.wait_for(90)
    job.kill("coordinator-0")
    job.kill("worker-2", signal.SIGSTOP)  # longer than its lease: a zombie when it goes on
    zombie = job.pid("worker-2")
    job.wait_for(140)
    time.sleep(4.5)
    os.kill(zombie, signal.SIGCONT)
    job.kill("server-0")  # the lead
    job.finish()
    ledger = check_counts(job.run_dir)
    assert ledger["applied"] >= 8192
    run = load_run(job.run_dir)
    assert run.summary["status"] == "done"
    assert sum(event["kind"] == "rollback" for event in run.events) >= 2


def test_with_backups_a_lost_lead_is_replaced_without_going_back(tmp_path):
    strategy = {**CONFIG["strategy"], "servers": 1, "workers": 2, "durability": "backup"}
    job = Launched(tmp_path, strategy=strategy, checkpoint={"every": 1000}, train={"budget": {"samples": 2048}})
    job.wait_for(30)
    before = job.version()
    job.kill("server-0")
    job.finish()
    assert check_counts(job.run_dir)["applied"] >= 2048
    run = load_run(job.run_dir)
    assert before >= 30
    assert not [event for event in run.events if event["kind"] == "rollback"]
    assert {event["kind"] for event in run.events} >= {"server_lost", "view"}
    # A server that is started again when all have gone, as a launcher may that has just lost it.
    alone = {"JAXDIST_RENDEZVOUS": f"127.0.0.1:{free_port()}", "JAXDIST_JOB_TOKEN": "x" * 32, "JAXDIST_RESTARTS": "1"}
    again = subprocess.run(
        [sys.executable, "-m", "jaxdist", "train", str(tmp_path / "config.yaml")],
        env={**job.environment, **alone, "JAXDIST_ROLE": "server", "JAXDIST_ROLE_INDEX": "0"},
        timeout=120,
        check=False,
    )
    assert again.returncode == 0
    assert load_run(job.run_dir).summary["status"] == "done"


def test_a_signal_saves_the_run_and_the_same_command_ends_it_on_another_number_of_servers(tmp_path):
    """And each update of both, the first as well as the last, is of a push of every worker."""
    strategy, batch = {**CONFIG["strategy"], "workers": 2, "consistency": {"kind": "bsp"}}, 2 * BATCH
    job = Launched(tmp_path, strategy=strategy)
    job.wait_for(40)
    job.process.send_signal(signal.SIGTERM)
    job.finish(75)
    first = check_counts(job.run_dir, batch)
    assert 0 < first["applied"] < 8192
    assert load_run(job.run_dir).summary["status"] == "stopped"
    assert first["applied"] == batch * saved_version(job.run_dir)
    again = Launched(tmp_path, strategy={**strategy, "servers": 1})
    again.finish()
    last = check_counts(job.run_dir, batch)
    assert load_run(job.run_dir).summary["status"] == "done"
    assert last["applied"] == batch * saved_version(job.run_dir)
    assert last["applied"] == 8192


def test_processes_that_joined_jax_themselves_meet_by_its_store_and_speak_tls(tmp_path):
    make_certificates(tmp_path / "certificates", ["127.0.0.1"], days=1)
    strategy = {
        **CONFIG["strategy"],
        "servers": 1,
        "workers": 2,
        "transport": {"certificates": str(tmp_path / "certificates")},
    }
    config = {**CONFIG, "strategy": strategy, "train": {"budget": {"samples": 512}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "run": {"dir": str(tmp_path / "run")}}))
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "joined_program.py"), address, "4"]
    jobs = [
        subprocess.Popen(
            [*command, str(process), str(path)],
            env={name: value for name, value in environment.items() if name != "JAX_NUM_CPU_DEVICES"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(4)
    ]
    said = [job.communicate(timeout=180)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, "\n".join(said)[-6000:]
    assert check_counts(tmp_path / "run")["applied"] >= 512
