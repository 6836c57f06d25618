"""Checkpoints under what only real processes show: other process counts, SIGKILL, a full disk."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdist.checkpoint import Checkpointer, manifest, read

SCRIPT = Path(__file__).with_name("checkpoint_process.py")

pytestmark = pytest.mark.processes


def start(*arguments: object, devices: int) -> subprocess.Popen:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(what: str, directory: Path, processes: int, devices: int) -> str:
    """Runs a job of so many processes of so many devices to its end; what it printed."""
    job: list[list] = [[]]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        job = [[address, processes, index] for index in range(processes)]
    started = [start(what, directory, *arguments, devices=devices) for arguments in job]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(printed)
    return "".join(printed)


def test_two_processes_save_and_one_restores_and_the_other_way_round(tmp_path):
    run("save", tmp_path / "by_two", processes=2, devices=2)
    assert "restored 3 refused []" in run("restore", tmp_path / "by_two", processes=1, devices=8)
    run("fail", tmp_path / "by_two", processes=2, devices=2)
    run("save", tmp_path / "by_one", processes=1, devices=8)
    step = tmp_path / "by_one" / "step_00000003"
    part = step / "trainer"
    biggest = max((path for path in part.rglob("d/*")), key=lambda path: path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-5])
    printed = run("restore", tmp_path / "by_one", processes=2, devices=2)
    # Only one of the two reads the damaged file; both must go back to step 2.
    assert printed.count("restored 2 refused [(3, ") == 2


def test_killed_at_any_moment_the_newest_is_whole(tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    from checkpoint_process import numbers

    moments = random.Random(0)
    steps = [0]
    for _ in range(6):
        process = start("loop", tmp_path, devices=1)
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line == "ready\n":
                    break
            assert printed[-1:] == ["ready\n"], "".join(printed)
            time.sleep(moments.uniform(0.15, 0.8))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        found = Checkpointer(tmp_path).newest()
        assert found is None or found.step >= steps[-1]
        if found:
            assert {why for _, why in found.refused} <= {"COMMIT is missing: never finished"}
            saved = read(tmp_path, found.step, prefix="")
            wanted = numbers(found.step)
            jax.tree.map(np.testing.assert_array_equal, saved["params"], wanted["params"])
            assert saved["step"] == wanted["step"] == found.meta["step"]
            steps.append(found.step)
    assert len(set(steps)) > 3, "the kills came before anything was saved"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB: four checkpoints of 4 MB, not five."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_gives_one_clear_error_and_harms_nothing(small_disk):
    printed = run("fill", small_disk, processes=1, devices=2)
    error = re.search(r"CheckpointDiskFull no space left on the disk while saving checkpoint (\d+)", printed)
    assert error, printed
    failed = int(error[1])
    assert failed > 2
    assert sorted(path.name for path in small_disk.iterdir()) == [f"step_{s:08d}" for s in range(1, failed)]
    for step in range(1, failed):
        directory = small_disk / f"step_{step:08d}"
        manifest.check_files(directory, manifest.load_manifest(directory), "hash")
    assert Checkpointer(small_disk).newest().step == failed - 1
