"""The doctor: judgement on the facts of clusters that are not here, gathering and meeting with real ones."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.cli import main
from jaxdist.cluster.doctor import facts, measure
from jaxdist.cluster.doctor.examine import judge
from jaxdist.cluster.doctor.findings import Finding, Report, spans
from jaxdist.cluster.doctor.meeting import Meeting, NotMet, meet, why_unreachable
from jaxdist.cluster.doctor.network import chosen
from jaxdist.mesh import build_mesh
from jaxdist.telemetry.wire import Collective, wire_bytes

ROOT = Path(__file__).parent.parent
GB = 10**9


def rank(index: int, host: str | None = None, *, gpus: int = 8, own: int | None = None, **changed: Any) -> dict:
    """Facts of a healthy rank on a GPU host of its own; `own` GPUs are what JAX uses."""
    host = host or f"gpu-{index}"
    return {
        "errors": {},
        "host": host,
        "cluster": {"processes": 2, "source": "SLURM", "why": "SLURM_PROCID", "local_device_ids": None},
        "expected_devices": None,
        "versions": {
            "python": "3.12.1",
            "jaxdist": "1",
            "jax": "0.10.2",
            "jaxlib": "0.10.2",
            "jax-cuda13-plugin": "1",
        },
        "gpus": {"ids": [f"{host}/{i}" for i in range(gpus)], "driver": "580.1"},
        "addresses": [f"10.0.0.{index + 1}"],
        "interfaces": {"eth0": {"address": f"10.0.0.{index + 1}", "speed": 100.0}},
        "infiniband": ["mlx5_0"],
        "environment": {},
        "limits": {"core": 0, "open_files": 65536},
        "shared_memory": 64 * GB,
        "memory": 500 * GB,
        "directory": {"path": "/shared", "free": 1000 * GB},
        "compile_cache": None,
        "sees_first": True,
        "clock": {"offset": 0.0, "error": 0.001},
        "devices": {"platform": "gpu", "kinds": ["NVIDIA H100"] * (gpus if own is None else own)},
        **changed,
    }


def on_cpu(index: int, **changed: Any) -> dict:
    return rank(index, gpus=0, devices={"platform": "cpu", "kinds": ["cpu"]}, **changed)


def wrong(*ranks: dict, level: str | None = None) -> list[Finding]:
    findings = judge(dict(enumerate(ranks)))
    return [f for f in findings if f.level == level or (level is None and f.level in ("warning", "problem"))]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_of_a_healthy_cluster_nothing_is_wrong():
    assert wrong(rank(0), rank(1)) == []
    assert wrong(on_cpu(0), on_cpu(1)) == []
    assert Report(judge({0: rank(0), 1: rank(1)}), {0: "gpu-0", 1: "gpu-1"}, 2).exit_code == 0


def test_the_rank_whose_jaxlib_differs_is_named_whatever_its_place():
    other = rank(0)["versions"] | {"jaxlib": "0.10.1"}
    found = only(wrong(rank(0, versions=other), rank(1), rank(2)))
    assert (found.level, found.ranks) == ("problem", (0,))
    assert "jaxlib differs: 0.10.2 on 1-2; 0.10.1 on 0" in found.text
    assert only(wrong(rank(0), rank(1, gpus=8) | {"gpus": rank(1)["gpus"] | {"driver": "1"}})).level == "warning"


@pytest.mark.parametrize(
    ("changed", "level", "way_out"),
    [
        ({"versions": {"jax": "0.10.2"}}, "problem", "pip install 'jaxdist[cuda13]'"),
        ({"environment": {"JAX_PLATFORMS": "cpu"}}, "warning", "JAX_PLATFORMS=cpu says so; unset it"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "warning", "CUDA_VISIBLE_DEVICES='' hides them"),
        ({}, "problem", "its CUDA plugin does not start"),
    ],
)
def test_gpus_that_jax_does_not_use_are_found_with_the_reason(changed: dict, level: str, way_out: str):
    found = only(wrong(rank(0, devices={"platform": "cpu", "kinds": ["cpu"]}, **changed)))
    assert found.level == level
    assert found.text.startswith("8 GPUs are there, JAX uses the CPU")
    assert way_out in found.text


def test_one_slurm_task_a_node_that_uses_one_gpu_of_eight_is_told_of_the_trap():
    place = rank(0)["cluster"] | {"local_device_ids": [0]}
    found = only(wrong(rank(0, own=1, cluster=place), rank(1, own=1, cluster=place)))
    assert found.ranks == (0, 1)
    assert "1 of 8 GPUs" in found.text
    assert "one task a node" in found.text


def test_tasks_from_which_slurm_hides_each_others_gpus_are_fine_and_tasks_that_share_them_are_not():
    hidden = [rank(i, "gpu-0", own=1) | {"gpus": {"ids": [f"uuid-{i}"], "driver": "580.1"}} for i in range(4)]
    assert wrong(*hidden) == []
    assert "4 processes use 32 GPUs of 8" in only(wrong(*[rank(i, "gpu-0") for i in range(4)])).text


def test_unlike_and_unexpected_devices_are_found():
    mixed = wrong(rank(0), rank(1) | {"devices": {"platform": "gpu", "kinds": ["NVIDIA A100"] * 8}})
    assert "kind of device differs" in only(mixed).text
    assert "JAX uses 8 x NVIDIA H100 (gpu), 4 were expected" in only(wrong(rank(0, expected_devices=4))).text


def test_a_host_name_that_is_loopback_is_a_problem_only_between_hosts_and_a_warning_where_it_works():
    debian = ["127.0.1.1"]
    found = only(wrong(on_cpu(0), on_cpu(1, addresses=debian)))
    assert (found.level, found.check, found.ranks) == ("problem", "dns", (1,))
    assert "127.0.1.1" in found.text
    assert wrong(on_cpu(0, host="one", addresses=debian), on_cpu(1, host="one", addresses=debian)) == []
    assert only(wrong(on_cpu(0, all_reduce=[]), on_cpu(1, all_reduce=[], addresses=debian))).level == "warning"
    assert only(wrong(rank(0), rank(1, addresses=debian))).level == "warning"  # NCCL does not ask for it
    assert "not resolve" in only(wrong(on_cpu(0), on_cpu(1, addresses="unknown"))).text


@pytest.mark.parametrize(
    ("pattern", "names"),  # the examples of NCCL's user guide
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("=eth0,eth1", ["eth0", "eth1"]),
        ("^docker", ["eth0", "eth1", "ib0"]),
        ("^=docker0", ["eth0", "eth1", "ib0"]),
        ("eth,ib", ["eth0", "eth1", "ib0"]),
        ("ens", []),
    ],
)
def test_nccl_s_interface_patterns_are_read_as_nccl_reads_them(pattern: str, names: list[str]):
    assert chosen(pattern, ["docker0", "eth0", "eth1", "ib0"]) == names


def test_nccl_variables_that_name_nothing_or_differ_are_found():
    settings = {"NCCL_SOCKET_IFNAME": "ens", "NCCL_IB_HCA": "mlx5_0:1"}
    found = only(wrong(rank(0, environment=settings), rank(1, environment=settings)))
    assert (found.level, found.ranks) == ("problem", (0, 1))
    assert found.text.startswith("NCCL_SOCKET_IFNAME=ens leaves no interface that is up; there are eth0")
    assert "NCCL_DEBUG differs" in only(wrong(rank(0), rank(1, environment={"NCCL_DEBUG": "INFO"}))).text


def test_a_clock_is_wrong_only_by_more_than_the_measurement_may_be_off():
    assert wrong(rank(0), rank(1, clock={"offset": 30.0, "error": 29.5})) == []
    assert "-30.000 s" in only(wrong(rank(0), rank(1, clock={"offset": -30.0, "error": 0.1}))).text


def test_a_proxy_is_a_warning_for_jobs_of_several_processes_unless_hosts_are_exempt():
    assert wrong(rank(0, environment={"https_proxy": "set"})) == []
    assert "https_proxy" in only(wrong(rank(0, environment={"https_proxy": "set"}), rank(1))).text
    assert wrong(rank(0, environment={"https_proxy": "set", "no_proxy": "set"}), rank(1)) == []


def test_the_disk_must_hold_the_kept_checkpoints_and_the_next_those_that_are_there_counted():
    state = {"all": 100 * GB, "in_host": 1, "kept": 3}
    free = {"path": "/shared", "free": 399 * GB}
    full = only(wrong(rank(0, state=state | {"saved": 0}, directory=free)))
    assert (full.level, full.values["needed"]) == ("problem", 400 * GB)
    assert wrong(rank(0, state=state | {"saved": GB}, directory=free)) == []


def test_a_rank_that_sees_another_directory_or_cannot_write_is_named():
    found = only(wrong(rank(0), rank(1, sees_first=False)))
    assert (found.level, found.ranks) == ("problem", (1,))
    readonly = {"path": "/shared", "free": GB, "error": "Read-only file system"}
    assert "Read-only" in only(wrong(rank(0), rank(1, directory=readonly))).text


def test_ranks_of_one_host_need_their_memory_together():
    state = {"all": 1, "in_host": 300 * GB, "kept": 1, "saved": 0}
    assert wrong(rank(0, state=state), rank(1, state=state)) == []
    halves = [rank(i, "gpu-0", own=4, state=state) for i in range(2)]
    assert only(wrong(*halves)).check == "memory"


def test_limits_are_judged():
    files, shared = wrong(rank(0, shared_memory=64 * 2**20, limits={"core": -1, "open_files": 256}))
    assert "256 open files at most" in files.text
    assert "--shm-size" in shared.text


def test_what_could_not_be_seen_is_said_and_only_jax_s_own_failures_are_problems():
    broken = rank(0)
    for name in ("limits", "interfaces", "versions", "gpus", "memory", "devices", "addresses", "directory"):
        del broken[name]
    assert wrong(broken | {"errors": {"limits": "OSError: none"}}) == []
    found = only(wrong(broken | {"errors": {"devices": "no device can be used"}}))
    assert (found.level, found.text) == ("problem", "JAX could not start: no device can be used")


def test_a_rank_that_never_came_is_a_problem_by_its_number():
    found = only(wrong(rank(0), {"errors": {}, "lost": "did not come within 60 s"}))
    assert (found.level, found.ranks) == ("problem", (1,))


def test_a_line_names_ranks_and_hosts_in_short():
    assert spans([5, 0, 2, 1, 8, 7]) == "0-2, 5, 7-8"
    report = Report([Finding("problem", "dns", "bad", (1, 2))], {i: f"gpu-{i // 2}" for i in range(4)}, 4)
    assert next(report.lines()) == "problem  dns          ranks 1-2 (gpu-0, gpu-1): bad"
    assert report.who((0, 1, 2, 3)) == "all ranks"


def test_bus_bandwidth_is_what_a_device_sends_and_each_axis_is_measured_with_right_sums(monkeypatch):
    monkeypatch.setitem(measure.LARGE, "cpu", 2**20)
    mesh = build_mesh({"data": 4, "tensor": 2}, jax.devices())
    rates = measure.all_reduce_rates(mesh)
    assert [(rate["axis"], rate["devices"], rate["right"]) for rate in rates] == [
        ("data", 4, True),
        ("tensor", 2, True),
    ]
    for rate in rates:
        groups = (tuple(range(rate["devices"])),)
        sent = wire_bytes(Collective("x", "all-reduce", "f32", 2**20, groups, rate["axis"], 1, False, True))
        assert rate["bus_bytes_per_second"] * rate["seconds"] == pytest.approx(sent)


def test_state_bytes_are_those_of_the_arrays():
    mesh = build_mesh({"data": 4, "fsdp": 2}, jax.devices())
    split = jax.device_put(jnp.ones((6, 5)), NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = jax.device_put(jnp.ones(7, jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
    on_devices = sum(shard.data.nbytes for x in (split, whole) for shard in x.addressable_shards)
    one_copy = 6 * 5 * 4 + 7 * 2
    assert measure.state_bytes([split, whole]) == {"all": one_copy, "in_host": one_copy + on_devices}


def test_a_fact_that_cannot_be_had_does_not_stop_the_others(tmp_path: Path):
    forever = threading.Event()
    seen = facts.gather({"bad": lambda: 1 / 0, "slow": forever.wait, "good": lambda: 3}, seconds=0.1)
    forever.set()
    assert seen["good"] == 3
    assert "ZeroDivisionError" in seen["errors"]["bad"]
    assert "0.1 s" in seen["errors"]["slow"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    assert facts.directory(tmp_path / "not" / "there")["path"] == str(tmp_path)
    assert facts.bytes_in(tmp_path) == 5


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_ranks_meet_before_jax_compare_clocks_and_do_without_one_that_leaves():
    at, results = f"localhost:{free_port()}", {}

    def take_part(index: int) -> None:
        meeting = meet(at, index, 4, timeout=2.0)  # rank 3 never comes
        meeting.compare_clocks()
        first = meeting.together(10 + index, lambda said: sum(said.values()))
        if index == 2:
            return meeting.lines[0]._socket.shutdown(socket.SHUT_RDWR)
        results[index] = (meeting, first, meeting.together(index, sorted))

    threads = [threading.Thread(target=take_part, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meeting: Meeting = results[0][0]
    assert [results[i][1:] for i in (0, 1)] == [(33, [0, 1])] * 2
    assert meeting.lost[3].startswith("did not come within 2 s")
    assert meeting.lost[2].startswith("was lost")
    assert all(abs(clock["offset"]) <= clock["error"] + 1e-3 for clock in meeting.clocks.values())  # one clock


def test_a_rank_that_cannot_reach_process_0_says_what_is_there_instead():
    port = free_port()
    with pytest.raises(NotMet, match=f"localhost refuses port {port}"):
        meet(f"localhost:{port}", 1, 2, timeout=0.3)
    with socket.create_server(("localhost", port)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"220 mail\n"), daemon=True).start()
        with pytest.raises(NotMet, match="no jaxdist doctor"):
            meet(f"localhost:{port}", 1, 2, timeout=2.0)
        with pytest.raises(NotMet, match=f"port {port} is in use"):
            meet(f"localhost:{port}", 0, 2, timeout=2.0)
    assert "no known host name" in why_unreachable(socket.gaierror(), "gpu-9", 1)
    assert "firewall" in why_unreachable(TimeoutError(), "gpu-9", 1)


def test_alone_it_prints_aligned_lines_and_a_config_that_does_not_fit_is_a_problem(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(measure.LARGE, "cpu", 2**20)
    assert main(["doctor", "quickstart", "strategy.mesh.data=3"]) == 1
    printed = capfd.readouterr().out
    assert "problem  state" in printed
    assert "8 are there" in printed
    assert "ok       all-reduce   data over 8 devices" in printed
    assert main(["doctor", "--timeout", "0"]) == 2
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


@pytest.mark.processes
def test_two_processes_report_once_that_they_are_alike_and_how_fast_they_are(tmp_path: Path):
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        "JAXDIST_COORDINATOR": f"localhost:{free_port()}",
        "JAXDIST_NUM_PROCESSES": "2",
    }
    (tmp_path / "c.yaml").write_text(
        "{model: {kind: mlp, hidden: [8]}, data: {kind: synthetic_blobs, samples: 64}, "
        "optimizer: {kind: sgd, learning_rate: 0.1}, "
        f"train: {{budget: {{steps: 1}}}}, run: {{dir: {tmp_path / 'run'}}}}}"
    )
    command = [sys.executable, "-m", "jaxdist", "doctor", str(tmp_path / "c.yaml"), "--json", "--expect-devices", "2"]
    command += ["strategy.mesh={data: 2, fsdp: 2}"]
    ranks = []
    for index in (1, 0):
        environment = {**common, "JAXDIST_PROCESS_ID": str(index)}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        time.sleep(0.5 * index)  # the other is there first, and waits
    try:
        (others, _), (said, errors) = [each.communicate(timeout=120) for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [each.returncode for each in ranks] == [0, 0], errors
    assert others == b""
    report = json.loads(said)
    by_check: dict[str, list[dict]] = {}
    for finding in report["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    assert report["processes"] == 2
    assert [f["ranks"] for f in by_check["versions"]] == [[0, 1]]
    assert f"jax {jax.__version__}" in by_check["versions"][0]["text"]
    assert [f["values"]["axis"] for f in by_check["all-reduce"]] == ["data", "fsdp"]
    assert all(f["values"]["bus_bytes_per_second"] > 0 and f["values"]["right"] for f in by_check["all-reduce"])
    assert by_check["disk"][0]["text"] == "every rank sees the same directory"
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]  # it leaves nothing behind
