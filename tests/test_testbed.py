"""Real network hosts, a real SLURM and a real Open MPI, hurt in every way. Not part of the default run; needs root.

JAXDIST_TESTBED is a directory with `netns_cluster.sh` (hosts jd0, jd1, ... at 10.77.0.10, .11, ...: up N, exec I CMD,
cut I, heal I, down), `slurm_cluster.sh` (a SLURM on such hosts: up N, exec CMD, down) and `netns_rsh.sh` (ssh between
them).
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxdist.cli import main
from jaxdist.telemetry.run_directory import LoadedRun, load_run

ROOT = Path(__file__).parent.parent
TESTBED = Path(os.environ.get("JAXDIST_TESTBED", "/nonexistent"))
CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.05},
    "train": {"budget": {"steps": 3000}, "global_batch_size": 24},
    "checkpoint": {"every": 100},
    "telemetry": {"log_every": 10, "exposed_communication": False},
}

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.skipif(not (TESTBED / "netns_cluster.sh").exists(), reason="JAXDIST_TESTBED names no testbed"),
]


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def on_testbed(script: str, *words: str) -> str:
    return subprocess.run(
        [str(TESTBED / script), *words], env=environment(), check=True, capture_output=True, text=True, timeout=180
    ).stdout


def within(seconds: float, happened: Callable[[], Any], what: str) -> float:
    """How long it took. Raises AssertionError after so many seconds."""
    started = time.monotonic()
    while not happened():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    print(f"{time.monotonic() - started:.1f} s: {what}")
    return time.monotonic() - started


def write_config(directory: Path, steps: int = 3000) -> Path:
    config = {**CONFIG, "train": {**CONFIG["train"], "budget": {"steps": steps}}}
    (directory / "c.yaml").write_text(yaml.safe_dump(config))
    return directory / "c.yaml"


def steps(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def resumes(run: Path) -> list[int]:
    return [event["step"] for event in load_run(run).events if event["kind"] == "resume"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """On one host: other numbers of devices differ by the order of sums alone."""
    directory = tmp_path_factory.mktemp("undisturbed")
    command = ["jaxdist", "train", str(write_config(directory)), f"run.dir={directory / 'run'}"]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=180)
    return load_run(directory / "run")


def assert_same_losses(run: Path, undisturbed: LoadedRun) -> None:
    found = load_run(run)
    assert found.summary["status"] == "done"
    ours, theirs = ({r["step"]: r["loss"] for r in run.records if "loss" in r} for run in (found, undisturbed))
    assert ours.keys() >= theirs.keys()  # it also records the step at which it was stopped
    np.testing.assert_allclose([ours[step] for step in theirs], list(theirs.values()), rtol=2e-3, atol=2e-4)


# Four hosts, a process on each, and nobody above them


class Hosts:
    def __init__(self, directory: Path):
        self.run = directory / "run"
        self.config = write_config(directory)
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        job = {"JAXDIST_COORDINATOR": "jd0:7777", "JAXDIST_NUM_PROCESSES": "4"}
        self.ranks = [
            subprocess.Popen(
                [str(TESTBED / "netns_cluster.sh"), "exec", str(rank), "jaxdist", "train", str(self.config),
                 f"run.dir={self.run}"],
                env=environment(**job, JAXDIST_PROCESS_ID=str(rank)),
                stdout=subprocess.DEVNULL,
                stderr=(self.run.parent / f"rank-{rank}.err").open("ab"),
            )
            for rank in range(4)
        ]  # fmt: skip

    def all_ended(self) -> bool:
        return all(rank.poll() is not None for rank in self.ranks)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    on_testbed("netns_cluster.sh", "up", "4", "1gbit")
    try:
        yield Hosts(tmp_path)
    finally:
        on_testbed("netns_cluster.sh", "down")


@pytest.mark.parametrize(("fault", "limit"), [("kill", 15), ("cut", 30)])
def test_four_hosts_with_nobody_above_them_all_end_when_one_is_lost_and_the_job_then_completes(
    fault: str, limit: float, hosts: Hosts, undisturbed: LoadedRun
):
    hosts.start()
    within(90, lambda: steps(hosts.run) >= 300, "four hosts train")
    if fault == "kill":
        hosts.ranks[2].kill()
    else:
        on_testbed("netns_cluster.sh", "cut", "2")
    within(limit, hosts.all_ended, f"all four ended after {fault}")
    print("exit codes", [rank.returncode for rank in hosts.ranks])
    assert hosts.ranks[0].returncode == 75
    assert "lost process 2" in (hosts.run.parent / "rank-0.err").read_text()
    if fault == "cut":
        on_testbed("netns_cluster.sh", "heal", "2")
    hosts.start()
    within(180, hosts.all_ended, "the job completes")
    assert [rank.returncode for rank in hosts.ranks] == [0, 0, 0, 0]
    assert len(resumes(hosts.run)) == 1
    assert_same_losses(hosts.run, undisturbed)


# SLURM


@pytest.fixture
def slurm() -> Iterator[Callable[..., str]]:
    on_testbed("slurm_cluster.sh", "up", "2")
    try:
        yield lambda *words: on_testbed("slurm_cluster.sh", "exec", *words)
    finally:
        on_testbed("slurm_cluster.sh", "down")


def rank_on(host: str) -> int:
    pids = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True).stdout.split()
    for pid in map(int, pids):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0].rpartition(b"/")[2].startswith(b"python") and b"train" in words:
            return pid
    raise AssertionError(f"no rank trains on {host}")


@pytest.mark.parametrize("fault", ["warning", "preempted", "killed"])
def test_the_sbatch_of_launch_is_requeued_and_resumes(
    fault: str, slurm: Callable[..., str], tmp_path: Path, undisturbed: LoadedRun
):
    run, log = tmp_path / "run", tmp_path / "job.log"
    script = [str(ROOT / "launch/slurm.sbatch"), "train", str(write_config(tmp_path)), f"run.dir={run}"]
    job = slurm("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={log}", *script).strip()
    within(120, lambda: steps(run) >= 300, "two nodes train")
    if fault == "warning":
        slurm("scancel", "--signal=USR1", job)
    elif fault == "preempted":
        slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3", "--output=/dev/null")
    else:
        os.kill(rank_on("jd1"), 9)
    within(60, lambda: "requeued, restart 1" in log.read_text(), f"requeued after: {fault}")
    within(240, lambda: not slurm("squeue", "--noheader", f"--jobs={job}").strip(), "the job completes")
    print(*re.findall(r"(?:attempt|ended with|resuming at).*", log.read_text()), sep="\n")
    assert len(resumes(run)) == 1
    assert_same_losses(run, undisturbed)


# Open MPI


def test_the_script_for_mpirun_restarts_when_a_rank_is_killed(tmp_path: Path, undisturbed: LoadedRun):
    on_testbed("netns_cluster.sh", "up", "2")
    try:
        run, job = tmp_path / "run", tmp_path / "job.sh"
        options = ["--hosts=jd0,jd1", "--gpus-per-node=0", f"--venv={sys.prefix}"]
        options += ["--setup=export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1", f"--output={job}"]
        command = ["train", str(write_config(tmp_path)), f"run.dir={run}"]
        assert main(["launch", "mpi", *options, "--render", "--", *command]) == 0
        script = subprocess.Popen(
            [str(TESTBED / "netns_cluster.sh"), "exec", "0", "bash", str(job)],
            env=environment(
                OMPI_ALLOW_RUN_AS_ROOT="1",
                OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                OMPI_MCA_plm_rsh_agent=str(TESTBED / "netns_rsh.sh"),
            ),
            stdout=(tmp_path / "log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        within(120, lambda: steps(run) >= 300, "two hosts train")
        os.kill(rank_on("jd1"), 9)
        within(240, lambda: script.poll() is not None, "the job completes")
        print(*re.findall(r"(?:ended with|.*resuming at).*", (tmp_path / "log").read_text()), sep="\n")
        assert script.returncode == 0
        assert len(resumes(run)) == 1
        assert_same_losses(run, undisturbed)
    finally:
        on_testbed("netns_cluster.sh", "down")
