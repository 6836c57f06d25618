"""Who the processes of a job are, from environments recorded of the real launchers.

The launches are in `launches.py`; "recorded" cases are of the real tools, "documented" ones are not.
"""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import (
    BATCH_SCRIPT,
    CRAY,
    GPU_BIND_SINGLE,
    GPUS_1_TASK,
    GPUS_2_TASKS,
    GPUS_4_TASKS,
    GPUS_PER_TASK_1,
    GPUS_PER_TASK_2,
    INDEXED_JOB,
    INTEL_MPI_HOSTS,
    JOBSET,
    MPICH_HOSTS,
    MPICH_LOCAL,
    ORTE_HOSTS,
    ORTE_LOCAL,
    PRRTE_HOSTS,
    PRRTE_LOCAL,
    PRTERUN,
    SALLOC_SHELL,
    SALLOC_SHELL_ON_NODE,
    SKYPILOT,
    SLURM_INTEL_MPI,
    SLURM_MPICH,
    SLURM_ORTE,
    SLURM_ORTE_1,
    SLURM_PRRTE,
    SRUN_2X2,
    SRUN_ARBITRARY,
    SRUN_HETEROGENEOUS,
    SRUN_ONE,
    SRUN_PMI2,
    SRUN_PTY,
    SRUN_UNEVEN,
    STEP_0_OF_TWO,
    STEP_1_OF_TWO,
    STEP_ON_SECOND_NODE,
    TORCHRUN,
    launch,
    parse,
)

from jaxdist.config.errors import UserError
from jaxdist.runtime.cluster_devices import local_devices
from jaxdist.runtime.cluster_hosts import PORTS, check_address, expand_counts, expand_node_list, step_port
from jaxdist.runtime.resolve_cluster import Cluster, describe, resolve_cluster

EPHEMERAL = range(32768, 61000)


def resolved(text: str, **more: str) -> list[Cluster]:
    return [resolve_cluster({**environ, **more}) for environ in launch(text)]


LAUNCHES = [  # text, source, host of process 0
    pytest.param(SRUN_2X2, "SLURM", "rc0", id="recorded srun 2 nodes of 2"),
    pytest.param(SRUN_UNEVEN, "SLURM", "rc0", id="recorded srun uneven"),
    pytest.param(STEP_ON_SECOND_NODE, "SLURM", "rc1", id="recorded srun --relative=1"),
    pytest.param(STEP_0_OF_TWO, "SLURM", "rc0", id="recorded step 0 of two"),
    pytest.param(SRUN_PMI2, "SLURM", "rc0", id="recorded srun --mpi=pmi2"),
    pytest.param(SRUN_HETEROGENEOUS, "SLURM", "rc0", id="recorded srun heterogeneous"),
    pytest.param(SLURM_ORTE, "Open MPI", "rc0", id="recorded mpirun 4.1 in SLURM"),
    pytest.param(SLURM_ORTE_1, "Open MPI", "rc0", id="recorded mpirun 4.1 -N 1 in SLURM"),
    pytest.param(SLURM_PRRTE, "Open MPI", "rc0", id="recorded mpirun 5.0 in SLURM"),
    pytest.param(SLURM_MPICH, "PMI", "rc0", id="recorded MPICH in SLURM"),
    pytest.param(SLURM_INTEL_MPI, "PMI", "rc0", id="recorded Intel MPI in SLURM"),
    pytest.param(ORTE_LOCAL, "Open MPI", "127.0.0.1", id="recorded mpirun 4.1 on one host"),
    pytest.param(PRRTE_LOCAL, "Open MPI", "127.0.0.1", id="recorded mpirun 5.0 on one host"),
    pytest.param(TORCHRUN, "torchrun", "10.78.0.10", id="recorded torchrun"),
    pytest.param(JOBSET, "Kubernetes", "run-workers-0-0.run", id="documented JobSet"),
    pytest.param(INDEXED_JOB, "Kubernetes", "run-0.run", id="documented Indexed Job"),
    pytest.param(CRAY, "PMI", "x1000", id="documented Cray"),
]


@pytest.mark.parametrize(("text", "source", "host"), LAUNCHES)
def test_processes_of_a_launch_agree_and_have_each_its_own_id(text: str, source: str, host: str) -> None:
    clusters = resolved(text, JAX_PLATFORMS="cpu")
    assert [c.process_id for c in clusters] == list(range(len(clusters)))
    assert {c.num_processes for c in clusters} == {len(clusters)}
    assert {c.source for c in clusters} == {source}
    (coordinator,) = {c.coordinator for c in clusters}
    assert coordinator is not None
    address, port = coordinator.rsplit(":", 1)
    assert address == host
    assert int(port) in PORTS


def test_skypilots_first_node_is_the_coordinators() -> None:
    clusters = resolved(SKYPILOT, SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6")
    assert [c.process_id for c in clusters] == [0, 1]
    assert {c.coordinator for c in clusters} == {clusters[0].coordinator}
    assert str(clusters[0].coordinator).startswith("10.0.0.5:")


def test_an_allocation_from_elsewhere_does_not_change_what_mpirun_started() -> None:
    """Bug it would catch: reading SLURM_PROCID=0 of the daemon on every rank (Open MPI before SLURM)."""
    assert {environ["SLURM_PROCID"] for environ in launch(SLURM_ORTE)} == {"0"}
    assert [c.process_id for c in resolved(SLURM_ORTE)] == [0, 1, 2, 3]


# --- ports


def test_two_steps_of_a_job_do_not_share_a_port() -> None:
    assert resolved(STEP_0_OF_TWO)[0].coordinator != resolved(STEP_1_OF_TWO)[0].coordinator


@given(job=st.integers(0, 2**31), steps=st.lists(st.integers(0, len(PORTS) - 1), min_size=2, max_size=2, unique=True))
def test_no_two_steps_of_any_job_share_a_port(job: int, steps: list[int]) -> None:
    assert step_port(job, steps[0]) != step_port(job, steps[1])


@given(job=st.integers(0, 2**31), later=st.integers(1, len(PORTS) - 1))
def test_first_steps_of_neighbouring_jobs_do_not_share_a_port(job: int, later: int) -> None:
    assert step_port(job, 0) != step_port(job + later, 0)


def test_ports_are_outside_those_that_linux_gives_to_any_program() -> None:
    assert not set(PORTS) & set(EPHEMERAL)
    assert PORTS[0] >= 1024


def test_two_mpiruns_on_a_host_do_not_share_a_port() -> None:
    assert resolved(ORTE_LOCAL)[0].coordinator != resolved(PRRTE_LOCAL)[0].coordinator


def test_torchruns_own_port_is_left_to_torchrun() -> None:
    """Its agent listens at MASTER_PORT while the processes live: a coordinator there could not start."""
    assert not str(resolved(TORCHRUN)[0].coordinator).endswith(":29500")
    by_hand = TORCHRUN.replace("TORCHELASTIC_USE_AGENT_STORE=True", "")
    assert str(resolved(by_hand)[0].coordinator) == "10.78.0.10:29500"


@pytest.mark.parametrize("text", [SRUN_2X2, TORCHRUN, SLURM_ORTE, MPICH_LOCAL, JOBSET])
def test_jaxdist_port_replaces_the_port(text: str) -> None:
    assert {str(c.coordinator).rsplit(":", 1)[1] for c in resolved(text, JAXDIST_PORT="12345")} == {"12345"}


# --- who shares a host's devices


@pytest.mark.parametrize(
    ("text", "devices"),  # of the tasks on each node of four GPUs
    [
        pytest.param(GPUS_1_TASK, [None], id="recorded one task for all"),
        pytest.param(GPUS_2_TASKS, [(0, 1), (2, 3)], id="recorded two tasks"),
        pytest.param(GPUS_4_TASKS, [(0,), (1,), (2,), (3,)], id="recorded a task for each"),
        pytest.param(GPUS_PER_TASK_1, [None] * 4, id="recorded --gpus-per-task=1"),
        pytest.param(GPUS_PER_TASK_2, [None] * 2, id="recorded --gpus-per-task=2"),
        pytest.param(GPU_BIND_SINGLE, [None] * 4, id="recorded --gpu-bind=single:1"),
    ],
)
def test_slurm_tasks_share_a_nodes_gpus(text: str, devices: list[tuple[int, ...] | None]) -> None:
    assert [c.local_device_ids for c in resolved(text)] == devices * 2


@pytest.mark.parametrize(("text", "visible"), [(GPUS_PER_TASK_1, "0"), (GPUS_PER_TASK_2, "0,1")])
def test_tasks_whose_own_gpus_are_numbered_from_0_use_them_all(text: str, visible: str) -> None:
    """Where SLURM confines tasks by cgroups, every task sees its GPUs as the first (documented)."""
    assert {c.local_device_ids for c in resolved(text, CUDA_VISIBLE_DEVICES=visible)} == {None}


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("0,1", [(0,), (1,), (0,), (1,)]),
        ("0,1,2,3,4,5,6,7", [(0, 1, 2, 3), (4, 5, 6, 7)] * 2),
        ("GPU-3f1a,GPU-77b0", [(0,), (1,), (0,), (1,)]),
        ("5", [None] * 4),
        ("", [None] * 4),
        ("-1", [None] * 4),
    ],
)
def test_torchruns_processes_share_the_gpus_that_they_see(
    visible: str, devices: list[tuple[int, ...] | None]
) -> None:
    assert [c.local_device_ids for c in resolved(TORCHRUN, CUDA_VISIBLE_DEVICES=visible)] == devices


def test_mpirun_in_an_allocation_shares_out_what_the_user_left_visible() -> None:
    """Bug it would catch: taking fewer GPUs than SLURM_GPUS_ON_NODE for a task's own, which only srun makes."""
    clusters = resolved(SLURM_ORTE, CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="4")
    assert [c.local_device_ids for c in clusters] == [(0,), (1,), (0,), (1,)]


def test_a_node_with_fewer_tasks_shares_its_gpus_among_fewer() -> None:
    """Bug it would catch: taking the first node's number of tasks for every node's."""
    clusters = resolved(SRUN_UNEVEN, CUDA_VISIBLE_DEVICES="0,1")
    assert [c.local_device_ids for c in clusters] == [(0,), (1,), None]


@given(processes=st.integers(1, 16), share=st.integers(1, 8))
def test_shares_of_a_host_are_equal_and_together_all_of_it(processes: int, share: int) -> None:
    total = processes * share
    shares = [local_devices({}, i, processes, None, total)[0] for i in range(processes)]
    assert shares == [None] or list(itertools.chain(*map(tuple, filter(None, shares)))) == list(range(total))
    assert processes == 1 or {len(own) for own in shares if own is not None} == {share}


def test_without_any_count_a_process_takes_the_device_of_its_local_rank() -> None:
    assert local_devices({}, 3, None, None, 0)[0] == (3,)
    assert local_devices({}, 1, 2, None, 0)[0] == (1,)
    assert local_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3, None, None, 0)[0] == (3,)


@pytest.mark.parametrize(("processes", "gpus"), [(3, 8), (8, 4), (2, 1)])
def test_gpus_that_cannot_be_shared_evenly_are_refused(processes: int, gpus: int) -> None:
    with pytest.raises(UserError, match=f"of {processes} on a host with {gpus} GPUs"):
        local_devices({}, 0, processes, None, gpus)


def test_devices_that_the_user_names_are_taken_as_they_are() -> None:
    clusters = resolved(TORCHRUN, CUDA_VISIBLE_DEVICES="0,1", JAXDIST_LOCAL_DEVICE_IDS="1,0")
    assert {c.local_device_ids for c in clusters} == {(1, 0)}
    assert {c.source for c in clusters} == {"torchrun"}


# --- order and combination

JAXDIST = parse("JAXDIST_COORDINATOR=a:1111 JAXDIST_NUM_PROCESSES=9 JAXDIST_PROCESS_ID=3")
JAX = parse("JAX_COORDINATOR_ADDRESS=b:2222 JAX_NUM_PROCESSES=7 JAX_PROCESS_ID=3 JAX_LOCAL_DEVICE_IDS=0")
BY_RANK = {
    "command line": {},
    "JAXDIST_*": JAXDIST,
    "JAX_*": JAX,
    "torchrun": launch(TORCHRUN)[3],
    "Open MPI": launch(SLURM_ORTE)[3],
    "PMI": launch(SLURM_MPICH)[3],
    "SLURM": launch(SRUN_2X2)[3],
    "Kubernetes": launch(JOBSET)[3],
    "single process": {},
}


@pytest.mark.parametrize("first", range(len(BY_RANK)))
def test_the_earlier_source_wins_over_all_later_ones(first: int) -> None:
    names = list(BY_RANK)
    environ: dict[str, str] = {"JAX_PLATFORMS": "cpu"}
    for name in reversed(names[first:]):
        environ |= BY_RANK[name]
    options = {"coordinator": "c:3333", "num_processes": 5, "process_id": 3} if first == 0 else {}
    assert resolve_cluster(environ, **options).source == names[first]  # type: ignore[arg-type]


def test_every_value_comes_from_the_first_that_has_it() -> None:
    cluster = resolve_cluster({**JAXDIST, **JAX}, coordinator="c:3333")
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("c:3333", 9, 3)
    assert cluster.local_device_ids == (0,)
    for name in ("--coordinator", "JAXDIST_NUM_PROCESSES", "JAXDIST_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS"):
        assert name in cluster.why
    assert "JAX_PROCESS_ID" not in cluster.why


@pytest.mark.parametrize("text", [ORTE_HOSTS, PRRTE_HOSTS, MPICH_HOSTS, INTEL_MPI_HOSTS, SRUN_ARBITRARY])
def test_what_a_launcher_cannot_say_is_refused_by_all_and_mended_by_the_coordinator_alone(text: str) -> None:
    for environ in launch(text):
        with pytest.raises(
            UserError, match=r"does not say on which host process 0 is: .*JAXDIST_COORDINATOR.HOST:PORT"
        ):
            resolve_cluster(environ)
    clusters = resolved(text, JAXDIST_COORDINATOR="rc0:21000", JAX_PLATFORMS="cpu")
    assert [c.process_id for c in clusters] == list(range(len(clusters)))
    assert {c.coordinator for c in clusters} == {"rc0:21000"}
    assert all("JAXDIST_COORDINATOR" in c.why for c in clusters)
    assert not {c.source for c in clusters} & {"command line", "JAXDIST_*"}


def test_rank_0_on_another_node_than_the_allocations_first_is_refused() -> None:
    """`mpirun --host rc1,rc2` in an allocation of rc[0-2]: only rank 0 can tell, and mpirun ends the others."""
    rank_0 = {**launch(SLURM_ORTE)[0], "PMIX_HOSTNAME": "rc1", "SLURMD_NODENAME": "rc1"}
    with pytest.raises(UserError, match="process 0 is on rc1, not on rc0"):
        resolve_cluster(rank_0)
    for names in (
        "SLURMD_NODENAME= PMIX_HOSTNAME=rc0.cluster.example",
        "SLURMD_NODENAME=rc0 PMIX_HOSTNAME=machine17",
    ):
        assert resolve_cluster({**launch(SLURM_ORTE)[0], **parse(names)}).process_id == 0


# --- one process


@pytest.mark.parametrize(
    ("text", "source", "why"),
    [
        pytest.param("", "single process", "no variables of a launcher", id="a laptop"),
        pytest.param(SRUN_ONE, "SLURM", "SLURM_STEP_NUM_TASKS=1", id="recorded srun -n1"),
        pytest.param(BATCH_SCRIPT, "single process", "not started by srun", id="recorded batch script"),
        pytest.param(SALLOC_SHELL, "single process", "not started by srun", id="recorded salloc"),
        pytest.param(SALLOC_SHELL_ON_NODE, "SLURM", "SLURM_STEP_NUM_TASKS=1", id="recorded salloc, interactive step"),
        pytest.param("MASTER_ADDR=a MASTER_PORT=1", "single process", "", id="exported for later"),
        pytest.param("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", "torchrun", "WORLD_SIZE=1", id="torchrun of one"),
        pytest.param("JAXDIST_NUM_PROCESSES=1", "JAXDIST_*", "JAXDIST_NUM_PROCESSES", id="said to be one"),
    ],
)
def test_one_process_is_recognised_and_the_reason_said(text: str, source: str, why: str) -> None:
    cluster = resolve_cluster(parse(text))
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == (None, 1, 0)
    assert cluster.local_device_ids is None
    assert cluster.source == source
    assert why in cluster.why


def test_world_size_of_a_batch_script_does_not_hide_srun() -> None:
    """Scripts for torch export WORLD_SIZE and leave RANK to the program."""
    clusters = resolved(SRUN_2X2, WORLD_SIZE="4", MASTER_ADDR="rc0", JAX_PLATFORMS="cpu")
    assert {c.source for c in clusters} == {"SLURM"}


# --- refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RANK=1", "does not say how many processes there are: set WORLD_SIZE"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 set, but not RANK"),
        ("RANK=1 WORLD_SIZE=4", "on which host process 0 is: set WORLD_SIZE, MASTER_ADDR"),
        ("RANK=1 WORLD_SIZE=4 MASTER_ADDR=a", "set JAXDIST_PORT"),
        ("RANK=4 WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1", "process 4 of 4 .*from 0 to the number less 1"),
        ("RANK=one WORLD_SIZE=4", "RANK=one: must be a whole number"),
        ("RANK=-1 WORLD_SIZE=4", "RANK=-1: must be a whole number"),
        ("RANK=1 WORLD_SIZE=4.0", "WORLD_SIZE=4.0: must be a whole number"),
        ("RANK=٣ WORLD_SIZE=4", "must be a whole number"),
        ("OMPI_COMM_WORLD_RANK=1", "does not say how many processes"),
        (PRTERUN, "does not say how many processes"),
        ("JOB_COMPLETION_INDEX=1", "set JAXDIST_NUM_PROCESSES .all pods."),
        ("JOB_COMPLETION_INDEX=1 JAXDIST_NUM_PROCESSES=2", "JAXDIST_COORDINATOR .JOB-0.SERVICE:PORT."),
        ("JOB_COMPLETION_INDEX=1 JAXDIST_NUM_PROCESSES=1", "process 1 of 1"),
        ("JOB_COMPLETION_INDEX=0 JOB_GLOBAL_INDEX=1 JAXDIST_NUM_PROCESSES=2", "JAXDIST_PODS_PER_JOB .now None."),
        ("JAXDIST_COORDINATOR=a:1", "set, but not JAXDIST_NUM_PROCESSES, JAXDIST_PROCESS_ID: set all three"),
        ("JAX_COORDINATOR_ADDRESS=a:1 JAX_NUM_PROCESSES=2", "set, but not JAXDIST_PROCESS_ID"),
        ("JAXDIST_NUM_PROCESSES=2 JAXDIST_PROCESS_ID=1", "set, but not JAXDIST_COORDINATOR"),
        ("JAXDIST_COORDINATOR=a:1 JAXDIST_NUM_PROCESSES=2 JAXDIST_PROCESS_ID=2", "process 2 of 2"),
        ("JAXDIST_COORDINATOR=a:1 JAXDIST_NUM_PROCESSES=0 JAXDIST_PROCESS_ID=0", "process 0 of 0"),
        (
            "JAXDIST_COORDINATOR=a JAXDIST_NUM_PROCESSES=2 JAXDIST_PROCESS_ID=1",
            "JAXDIST_COORDINATOR=a: must be host:port",
        ),
        (
            "JAXDIST_COORDINATOR=a:1 JAXDIST_NUM_PROCESSES=2 JAXDIST_PROCESS_ID=1 JAXDIST_PORT=2",
            "JAXDIST_PORT=2: has no",
        ),
        ("JAXDIST_LOCAL_DEVICE_IDS=0,x", "JAXDIST_LOCAL_DEVICE_IDS=x: must be a whole number"),
        ("JAXDIST_LOCAL_DEVICE_IDS=0,0", "names a device twice"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a JAXDIST_PORT=70000", "JAXDIST_PORT=70000: must be a port"),
    ],
)
def test_half_a_cluster_is_refused_with_the_way_out(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_cluster(parse(words))


def test_a_shell_of_several_tasks_is_refused() -> None:
    """recorded: `srun -N2 --pty bash`, where the second shell ends at once and nobody would come."""
    for environ in launch(SRUN_PTY):
        with pytest.raises(UserError, match="leave --pty out"):
            resolve_cluster(environ)


def test_mpich_on_one_host_needs_a_port_of_its_own() -> None:
    """Its variables name no job, and two jobs at one port would mix."""
    with pytest.raises(UserError, match="set JAXDIST_PORT"):
        resolved(MPICH_LOCAL)


def test_a_number_that_contradicts_the_launcher_is_refused_by_all() -> None:
    for environ in launch(SRUN_2X2):
        with pytest.raises(UserError, match=r"JAXDIST_NUM_PROCESSES=2, but SLURM .* started 4"):
            resolve_cluster({**environ, "JAXDIST_NUM_PROCESSES": "2"})


def test_other_ids_than_the_launchers_need_another_coordinator() -> None:
    with pytest.raises(UserError, match="set JAXDIST_COORDINATOR=HOST:PORT, too"):
        resolve_cluster(launch(SRUN_2X2)[0], process_id=3)
    moved = resolve_cluster(launch(SRUN_2X2)[0], process_id=3, coordinator="rc1:21000")
    assert (moved.process_id, moved.num_processes, moved.source) == (3, 4, "command line")


# --- pieces


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("jd0", "jd0"),
        ("jd[0-3,7],gpu-a[01-02]b", "jd0 jd1 jd2 jd3 jd7 gpu-a01b gpu-a02b"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("a,b[2],c", "a b2 c"),
        ("node-1.example.org", "node-1.example.org"),
    ],
)
def test_node_lists_expand_as_slurm_writes_them(text: str, hosts: str) -> None:
    assert expand_node_list(text) == hosts.split()


@pytest.mark.parametrize("text", ["", "a[1-2", "a1-2]", "a[2-1]", "a[x]", "a[]", "a,,b", "a[1,]", "a b", "a[1-2-3]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_node_list(text)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 3)), min_size=1, max_size=3),
    st.sampled_from(["n", "gpu-a"]),
)
def test_ranges_of_a_node_list_keep_order_and_zeros(ranges: list[tuple[int, int, int]], prefix: str) -> None:
    spans = [(min(a, b), max(a, b), width) for a, b, width in ranges]
    text = prefix + "[" + ",".join(f"{a:0{width}}-{b}" for a, b, width in spans) + "]"
    expected = [prefix + str(i).zfill(max(width, len(str(a)))) for a, b, width in spans for i in range(a, b + 1)]
    assert expand_node_list(text) == expected


def test_task_counts_expand_as_slurm_writes_them() -> None:
    assert expand_counts("2(x3),1,4(x2)", "X") == [2, 2, 2, 1, 4, 4]
    with pytest.raises(UserError, match="X=2x3"):
        expand_counts("2x3", "X")


@pytest.mark.parametrize("address", ["a:1", "10.0.0.1:65535", "[fd00::1]:20000", "[fe80::1%eth0]:20000"])
def test_addresses_are_host_and_port(address: str) -> None:
    assert check_address(address, "X") == address


@pytest.mark.parametrize(
    "address", ["a", "a:", ":1", "a:0", "a:65536", "fd00::1:20000", "a b:1", "http://a:1", "a:1x"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"X=.*: must be host:port"):
        check_address(address, "X")


def test_an_ipv6_master_address_gets_brackets() -> None:
    environ = parse("RANK=1 WORLD_SIZE=2 MASTER_ADDR=fd00::1 MASTER_PORT=29500")
    assert resolve_cluster(environ).coordinator == "[fd00::1]:29500"


def test_the_line_for_the_user_names_place_devices_and_reason() -> None:
    line = describe(resolved(TORCHRUN, CUDA_VISIBLE_DEVICES="0,1,2,3")[3])
    assert "\n" not in line
    for words in ("torchrun", "process 3 of 4", "10.78.0.10:", "local devices 2,3", "RANK=3"):
        assert words in line
    assert describe(resolve_cluster({})) == "cluster   one process (no variables of a launcher)"


def test_resolving_needs_no_jax() -> None:
    """A launcher asks before jax is imported, which takes seconds."""
    program = "import sys, jaxdist.runtime.resolve_cluster; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
