"""`jaxdist launch`: real processes, hurt in every way; how soon the job has ended, and that it then completes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxdist.telemetry.run_directory import LoadedRun, load_run

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"target": "faults:digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.05},
    "train": {"budget": {"steps": 200}, "global_batch_size": 24, "eval_every": 100},
    "checkpoint": {"every": 20},
    "telemetry": {"log_every": 1, "exposed_communication": False},
}
SLOWLY = 0.002  # seconds for a sample: 5 seconds for a run, so that there is time to hurt it
AFTER = 12 * 150  # samples that a process reads for 150 steps; the loader is up to 32 steps ahead

pytestmark = pytest.mark.processes


@dataclass
class Launched:
    process: subprocess.Popen[str]
    run_dir: Path

    def finish(self, code: int = 0) -> str:
        try:
            said = self.process.communicate(timeout=180)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == code, said
        return said

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def pids(self) -> list[int]:
        logs = sorted((self.run_dir / "logs").glob("rank-*.log"))
        return [int(re.findall(r"process id (\d+)", log.read_text())[-1]) for log in logs]

    def wait_until(self, happened: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 120
        while not (result := happened()):
            assert time.monotonic() < deadline, "it never happened"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.005)
        return result


def launch(
    directory: Path,
    *overrides: str,
    procs: int = 2,
    options: tuple[str, ...] = (),
    config: Any = CONFIG,
    **fault: Any,
) -> Launched:
    """A job with a `fault` in one process's data (see faults.py), met once."""
    directory.mkdir(exist_ok=True)
    if fault:
        fault = {"marker": str(directory / "marker"), **fault} if "fault" in fault else fault
        config = {**config, "data": {**config["data"], **fault}}
    (directory / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["launch", "--procs", str(procs), *options, "--", "train", str(directory / "c.yaml")]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdist", *command, f"run.dir={directory / 'run'}", *overrides],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAXDIST_HEARTBEAT_SECONDS": "4",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Launched(process, directory / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    job = launch(tmp_path_factory.mktemp("undisturbed"))
    said = job.finish()
    assert "[rank 0] done" in said
    assert "[launch]" not in said
    return load_run(job.run_dir)


def assert_same_result(run_dir: Path, undisturbed: LoadedRun) -> None:
    """Bit for bit, whatever happened on the way: no sample was left out and none was used twice."""
    run = load_run(run_dir)
    assert run.summary["status"] == "done"
    assert run.metrics["step"].tolist() == undisturbed.metrics["step"].tolist()
    assert run.metrics["loss"].tolist() == undisturbed.metrics["loss"].tolist()
    assert run.summary["final"]["eval.loss"] == undisturbed.summary["final"]["eval.loss"]


def seconds_to_the_end(job: Launched, marker: Path) -> float:
    """From the fault to the moment at which the launcher had ended all processes."""
    (ended,) = job.events("attempt_ended")
    return datetime.fromisoformat(ended["time"]).timestamp() - float(marker.read_text())


@pytest.mark.parametrize(
    ("rank", "fault", "said"),
    [
        (1, "raise", r"first to fail: rank 1 .*exit code 1(.|\n)*KeyError: 'the fault of this test'"),
        (0, "raise", r"first to fail: rank 0 .*exit code 1(.|\n)*KeyError: 'the fault of this test'"),
        (1, "SIGKILL", r"first to fail: rank 1 .*killed by SIGKILL"),
        (0, "SIGKILL", r"first to fail: rank 0 .*killed by SIGKILL"),
        (1, "SIGSTOP", r"lost process 1: no sign of life for 4 s"),
        (1, "SIGTERM", r"SIGTERM: saved at step \d+"),
    ],
)
def test_a_job_in_which_a_rank_fails_ends_within_10_seconds_and_then_completes_as_if_nothing_had_been(
    rank: int, fault: str, said: str, tmp_path: Path, undisturbed: LoadedRun
):
    job = launch(tmp_path, rank=rank, fault=fault, after=AFTER)
    output = job.finish()
    assert re.search(said, output), output
    assert seconds_to_the_end(job, tmp_path / "marker") < 10
    resumed = [event["step"] for event in job.events("resume")]
    assert len(resumed) == 1
    assert 80 <= resumed[0] < 200
    assert_same_result(job.run_dir, undisturbed)


def test_a_rank_that_stands_still_ends_the_job_with_the_stacks_of_all_ranks_in_their_logs(
    tmp_path: Path, undisturbed: LoadedRun
):
    job = launch(tmp_path, "run.stall_seconds=3", rank=1, fault="hang", after=AFTER)
    assert "nothing has moved for" in job.finish()
    assert seconds_to_the_end(job, tmp_path / "marker") < 15
    stuck, waiting = [(job.run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in (1, 0)]
    assert re.search(r'File ".*faults.py", line \d+ in meet', stuck)
    assert re.search(r'File ".*loop.py", line \d+ in (read|run)', waiting)
    assert_same_result(job.run_dir, undisturbed)


def test_a_signal_to_the_launcher_saves_and_stops_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: LoadedRun
):
    job = launch(tmp_path, pause=SLOWLY)
    job.wait_until(lambda: job.events("committed"))
    job.process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    job.finish(code=75)
    assert time.monotonic() - asked < 10
    stopped = load_run(job.run_dir)
    assert stopped.summary["status"] == "stopped"
    assert 20 <= job.events("committed")[-1]["step"] == stopped.summary["steps"] < 200
    launch(tmp_path, pause=SLOWLY).finish()
    assert [event["step"] for event in job.events("resume")] == [stopped.summary["steps"]]
    assert_same_result(job.run_dir, undisturbed)


def test_no_rank_outlives_a_launcher_that_is_killed_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: LoadedRun
):
    job = launch(tmp_path, pause=SLOWLY)
    job.wait_until(lambda: job.events("committed"))
    ranks = job.pids()
    job.process.kill()
    job.process.wait()
    deadline = time.monotonic() + 5
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.05)
    launch(tmp_path, pause=SLOWLY).finish()
    assert_same_result(job.run_dir, undisturbed)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_clock_of_the_training_does_not_count_the_wait_for_the_slowest_compiler(tmp_path: Path):
    model = {"target": "faults:Late", "rank": 1, "seconds": 2.5}
    late = {**CONFIG, "model": model, "train": {"global_batch_size": 50}}
    job = launch(tmp_path, "train.budget={steps: 2}", "telemetry.log_every=1", config=late)
    job.finish()
    run = load_run(job.run_dir)
    assert run.summary["seconds"]["compile"] > 5, "rank 0 waited for it"
    assert run.metrics["seconds"][-1] < 2.5


def test_a_signal_during_compilation_ends_the_job_at_once_and_the_same_command_starts_it(tmp_path: Path):
    deep = {
        "kind": "transformer", "layers": 6, "width": 16, "heads": 2, "context": 16, "scan_layers": False,
    }  # fmt: skip
    data = {"kind": "python_stdlib", "validation_fraction": 0.01}
    config = {**CONFIG, "model": deep, "data": data, "train": {**CONFIG["train"], "budget": {"steps": 3}}}
    job = launch(tmp_path, "telemetry.compile_cache=null", config=config)
    job.wait_until(lambda: job.events("start"))  # the next thing is the compilation
    time.sleep(0.7)
    job.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    said = job.finish(code=75)
    assert time.monotonic() - asked < 5
    assert "SIGTERM: nothing was trained since the last checkpoint" in said
    assert not (job.run_dir / "metrics.jsonl").read_text()
    launch(tmp_path, config=config).finish()
    assert load_run(job.run_dir).metrics["step"].tolist() == [1, 2, 3]


def test_a_signal_during_a_checkpoint_lets_it_be_finished(tmp_path: Path, undisturbed: LoadedRun):
    job = launch(tmp_path, "checkpoint.every=5", pause=SLOWLY)
    checkpoints = job.run_dir / "checkpoints"
    writing = job.wait_until(lambda: [p for p in checkpoints.glob("step_*") if not (p / "COMMIT").exists()])
    job.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    job.finish(code=75)
    assert time.monotonic() - asked < 10
    saved = [event["step"] for event in job.events("committed")]
    assert int(writing[0].name.removeprefix("step_")) in saved
    assert saved[-1] == load_run(job.run_dir).summary["steps"] < 200
    launch(tmp_path, "checkpoint.every=5", pause=SLOWLY).finish()
    assert_same_result(job.run_dir, undisturbed)


def test_a_signal_to_one_rank_during_an_evaluation_cuts_it_short_on_all(tmp_path: Path, undisturbed: LoadedRun):
    job = launch(tmp_path, rank=1, fault="SIGTERM", after=60, where="validation")
    job.finish()
    assert [event["step"] for event in job.events("resume")] == [100]  # saved where it was to be evaluated
    run = load_run(job.run_dir)
    assert [record["step"] for record in run.records if "eval.loss" in record] == [200]
    assert run.metrics["loss"].tolist() == undisturbed.metrics["loss"].tolist()


def test_the_last_evaluation_is_made_up_for_if_a_signal_cut_it_short(tmp_path: Path, undisturbed: LoadedRun):
    job = launch(tmp_path, "train.eval_every=null", rank=1, fault="SIGTERM", after=60, where="validation")
    job.finish()
    assert [event["step"] for event in job.events("resume")] == [200]
    final = load_run(job.run_dir).summary["final"]
    assert {name: final[name] for name in ("step", "loss", "eval.loss")} == {
        name: undisturbed.summary["final"][name] for name in ("step", "loss", "eval.loss")
    }


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small tmpfs")
def test_a_full_disk_ends_the_attempt_and_the_job_completes_once_there_is_room(
    tmp_path: Path, undisturbed: LoadedRun
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=False).returncode:
        pytest.skip("may not mount")
    try:
        job = launch(disk / "job", options=("--max-restarts", "8"), pause=SLOWLY)
        job.wait_until(lambda: job.events("committed"))
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        full = time.monotonic()
        job.wait_until(lambda: not any(map(is_running, job.pids())))
        assert time.monotonic() - full < 10
        filler.unlink()
        said = job.finish()
        assert re.search(r"disk is full|no space left", said, re.I), said
        assert_same_result(job.run_dir, undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_job_goes_on_with_fewer_processes_where_one_keeps_dying(tmp_path: Path):
    job = launch(
        tmp_path, procs=3, options=("--min-procs", "2"), rank=2, fault="SIGKILL", after=8 * 20, marker=None
    )  # fmt: skip
    said = job.finish()
    assert "rank 2 died 2 times in a row: going on with 2 processes" in said
    assert load_run(job.run_dir).summary["devices"]["processes"] == 2


def test_a_job_is_given_up_after_its_restarts_with_the_traceback_of_the_first(tmp_path: Path):
    job = launch(tmp_path, options=("--max-restarts", "1"), rank=1, fault="raise", after=0, marker=None)
    said = job.finish(code=1)
    assert said.count("first to fail: rank 1") == 2
    assert "giving up after 1 restarts" in said


def test_each_line_of_output_is_once_in_the_log_of_its_rank(undisturbed: LoadedRun):
    log = (undisturbed.path / "logs/rank-0.log").read_text()
    assert log.count("step 200/200") == 1
    assert log.count("jaxdist.sync.loop: read ") == 1
    assert "validation loss" not in (undisturbed.path / "logs/rank-1.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch", "--procs", "2"], "stands behind --"),
        (["launch", "--", "export", "x"], "'export' cannot be launched"),
        (["launch", "--procs", "0", "--", "train", "quickstart"], "--procs 0"),
        (["launch", "--max-restarts", "2", "--", "doctor"], "--max-restarts has no effect with doctor"),
        (["launch", "--procs", "2", "slurm", "--render", "--", "train", "quickstart"], "--procs has no effect"),
        (["launch", "slurm", "--nodes", "2", "-o", "/no/such/job", "--", "train", "quickstart"], "cannot be written"),
        (["launch", "slurm", "--nodes", "2", "--render", "--", "train", "nope"], "no such file"),
        (["launch", "--procs", "2", "--min-procs", "3", "--", "train", "quickstart"], "--min-procs 3"),
        (["launch", "--devices-per-proc", "0", "--", "train", "quickstart"], "--devices-per-proc 0"),
        (["launch", "--", "train", "quickstart", "train.budgett=3"], "train.budget"),
        (["launch", "--", "train"], "the command behind -- is not right"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    from jaxdist.cli import main

    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "snapshot_every", "state_of"),
    [("SIGKILL", 10, "snapshot"), ("SIGSTOP", 10, "snapshot"), ("raise", 1000, "checkpoint")],
)
def test_those_that_are_left_go_on_in_place_when_one_is_lost(
    fault: str, snapshot_every: int, state_of: str, tmp_path: Path, undisturbed: LoadedRun
):
    # 24 samples on 3 processes, then on 2
    config = {**CONFIG, "run": {"elastic": "shrink", "snapshot_every": snapshot_every}}
    job = launch(tmp_path, procs=3, config=config, rank=2, fault=fault, after=8 * 150)
    said = job.finish()
    (shrunk,) = job.events("shrink")
    assert shrunk["processes"] == 2
    assert shrunk["state_of"] == state_of
    assert len(job.events("start") + job.events("resume")) == 1, said  # nobody was started again
    run = load_run(job.run_dir)
    assert run.metrics["step"].tolist() == undisturbed.metrics["step"].tolist()
    np.testing.assert_allclose(run.metrics["loss"], undisturbed.metrics["loss"], rtol=1e-4)
