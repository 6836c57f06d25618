"""What each launcher says of its processes, read from the variables that it gives them.

Every source is a function of the environment that returns what it found, or None if that launcher is not there.
It asks no network and no daemon. What the variables cannot say stays None, with the way out in `hint`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.runtime.cluster_hosts import PORTS, expand_counts, expand_node_list, hashed_port, step_port

Environ = Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """What one launcher says."""

    source: str
    why: str
    process_id: int
    num_processes: int | None
    hint: str  # how to give what is missing
    host: str | None = None  # of process 0
    port: int | None = None  # for process 0; nothing else listens there
    here: str | None = None  # what the launcher calls this host
    local_rank: int | None = None  # among the processes of this host
    local_count: int | None = None
    slurm_gpus: int | None = None  # of the step on this host, where srun may have given each task its own


def parse_whole(text: str, name: str) -> int:
    """Raises UserError, naming `name`, for anything but digits."""
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text}: must be a whole number, at least 0")
    return int(text)


def whole(environ: Environ, name: str) -> int | None:
    """A variable's whole number, None if it is unset or empty. Raises UserError for anything else."""
    return parse_whole(environ[name], name) if environ.get(name) else None


def torchrun(environ: Environ) -> Found | None:
    """RANK and the rest of torchrun's variables, which many other tools set too."""
    rank = whole(environ, "RANK")
    if rank is None:
        return None
    host, port = environ.get("MASTER_ADDR"), whole(environ, "MASTER_PORT")
    if port is not None and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun itself listens at MASTER_PORT, for as long as its processes live.
        port = hashed_port(f"{host}:{port}:{environ.get('TORCHELASTIC_RUN_ID')}")
    return Found(
        source="torchrun",
        why=f"RANK={rank}, WORLD_SIZE={environ.get('WORLD_SIZE', 'unset')}",
        process_id=rank,
        num_processes=whole(environ, "WORLD_SIZE"),
        hint="set WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun does, or unset RANK for one process",
        host=host or None,
        port=port,
        local_rank=whole(environ, "LOCAL_RANK"),
        local_count=whole(environ, "LOCAL_WORLD_SIZE"),
    )


def open_mpi(environ: Environ) -> Found | None:
    """`mpirun` of Open MPI, 4 (ORTE) and 5 (PRRTE).

    Its variables say where mpirun runs, not where rank 0 does. Inside a SLURM allocation that is the first node,
    unless mpirun was told otherwise; rank 0 makes sure.
    """
    rank, size = whole(environ, "OMPI_COMM_WORLD_RANK"), whole(environ, "OMPI_COMM_WORLD_SIZE")
    if rank is None:
        return None
    local_count = whole(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    on_one_host = local_count is not None and local_count == size
    nodes = None if on_one_host else environ.get("SLURM_JOB_NODELIST")
    return Found(
        source="Open MPI",
        why=f"OMPI_COMM_WORLD_RANK={rank}, OMPI_COMM_WORLD_SIZE={size}"
        + (f", SLURM_JOB_NODELIST={nodes}" if nodes else ""),
        process_id=rank,
        num_processes=size,
        hint="mpirun -x JAXDIST_COORDINATOR=HOST:PORT, HOST being rank 0's, which need not be where mpirun runs",
        host="127.0.0.1" if on_one_host else expand_node_list(nodes)[0] if nodes else None,
        port=hashed_port(environ["PMIX_NAMESPACE"]) if environ.get("PMIX_NAMESPACE") else None,
        here=(environ.get("SLURMD_NODENAME") or environ.get("PMIX_HOSTNAME")) if nodes else None,
        local_rank=whole(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_count=local_count,
    )


_LOCAL_RANKS = (
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Hydra: MPICH, Intel MPI
    ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
    ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
)


def pmi(environ: Environ) -> Found | None:
    """`mpiexec` of MPICH, Intel MPI and Cray, and anything else that sets PMI_RANK or PMIX_RANK.

    `srun --mpi` sets them too, but SLURM's own variables say more: those are left to `slurm`.
    """
    name = next((name for name in ("PMI_RANK", "PMIX_RANK") if environ.get(name)), None)
    in_step = "SLURM_STEP_NODELIST" in environ
    if name is None or (in_step and "MPI_LOCALRANKID" not in environ and "PRTE_LAUNCHED" not in environ):
        return None
    rank, size = whole(environ, name), whole(environ, "PMI_SIZE")
    assert rank is not None
    local_rank, local_count = next(
        ((whole(environ, r), whole(environ, c)) for r, c in _LOCAL_RANKS if r in environ), (None, None)
    )
    on_one_host = local_count is not None and local_count == size
    nodes = environ.get("SLURM_STEP_NODELIST") if "MPI_LOCALRANKID" in environ and not on_one_host else None
    return Found(
        source="PMI",
        why=f"{name}={rank}" + ("" if size is None else f", PMI_SIZE={size}"),
        process_id=rank,
        num_processes=size,
        hint="mpiexec -genv JAXDIST_COORDINATOR HOST:PORT (Cray: --env NAME=VALUE), HOST being rank 0's",
        host="127.0.0.1" if on_one_host else expand_node_list(nodes)[0] if nodes else None,
        port=_slurm_port(environ) if "MPI_LOCALRANKID" in environ else None,
        here=environ.get("MPIR_CVAR_CH3_INTERFACE_HOSTNAME") if nodes else None,
        local_rank=local_rank,
        local_count=local_count,
    )


def slurm(environ: Environ) -> Found | None:
    """A task of `srun`. A batch script and salloc's shell have SLURM_PROCID or SLURM_NTASKS, too, but no step."""
    nodes, rank = environ.get("SLURM_STEP_NODELIST"), whole(environ, "SLURM_PROCID")
    if not nodes or rank is None:
        return None
    # SLURM_NTASKS may be the allocation's, as in salloc's shell on the first node.
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    tasks = whole(environ, count)
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    if environ.get("SLURM_PTY_PORT") and tasks != 1:
        raise UserError(
            f"SLURM step {step} has {tasks} tasks and a terminal (srun --pty), which only the first task reads: "
            "leave --pty out, or ask for one task (srun --pty -n1)"
        )
    # With a hostfile's order task 0 may be anywhere, and the node list is sorted all the same.
    arbitrary = environ.get("SLURM_DISTRIBUTION") == "arbitrary"
    node, tasks_per_node = whole(environ, "SLURM_NODEID"), environ.get("SLURM_STEP_TASKS_PER_NODE")
    counts = expand_counts(tasks_per_node, "SLURM_STEP_TASKS_PER_NODE") if tasks_per_node else []
    return Found(
        source="SLURM",
        why=f"step {step} on {nodes}: SLURM_PROCID={rank}, {count}={tasks}",
        process_id=rank,
        num_processes=tasks,
        hint="srun --export=ALL,JAXDIST_COORDINATOR=HOST:PORT, HOST being task 0's"
        + (" (with --distribution=arbitrary only you know which)" if arbitrary else ""),
        host=None if arbitrary else expand_node_list(nodes)[0],
        port=_slurm_port(environ),
        here=environ.get("SLURMD_NODENAME"),
        local_rank=whole(environ, "SLURM_LOCALID"),
        local_count=counts[node] if node is not None and node < len(counts) else None,
        slurm_gpus=whole(environ, "SLURM_GPUS_ON_NODE"),
    )


def _slurm_port(environ: Environ) -> int | None:
    job, step = whole(environ, "SLURM_JOB_ID"), whole(environ, "SLURM_STEP_ID")
    return None if job is None or step is None else step_port(job, step)


def kubernetes(environ: Environ) -> Found | None:
    """A pod of an Indexed Job, alone or in a JobSet.

    JOB_COMPLETION_INDEX comes from Kubernetes. The manifest sets JAXDIST_NUM_PROCESSES and, for an Indexed Job,
    JAXDIST_COORDINATOR; for a JobSet JOBSET_NAME and REPLICATED_JOB_NAME from the pod's annotations, and where
    there are several replicas JOB_GLOBAL_INDEX (an annotation, too) and JAXDIST_PODS_PER_JOB.
    """
    index = whole(environ, "JOB_COMPLETION_INDEX")
    if index is None:
        return None
    why, host = f"JOB_COMPLETION_INDEX={index}", None
    jobset, replicated_job = environ.get("JOBSET_NAME"), environ.get("REPLICATED_JOB_NAME")
    job, pods = whole(environ, "JOB_GLOBAL_INDEX"), whole(environ, "JAXDIST_PODS_PER_JOB")
    if jobset:
        why = f"JOBSET_NAME={jobset}, JOB_GLOBAL_INDEX={job or 0}, {why}"
        # https://jobset.sigs.k8s.io: JOBSET-REPLICATEDJOB-JOB-POD, in a headless service of the set's name
        host = f"{jobset}-{replicated_job}-0-0.{jobset}" if replicated_job else None
    if job is not None:
        if pods is None or index >= pods:
            raise UserError(
                f"JOB_GLOBAL_INDEX={job} and JOB_COMPLETION_INDEX={index} make a process id only with "
                f"JAXDIST_PODS_PER_JOB (now {pods}): set it to the parallelism of each job"
            )
        index += job * pods
    return Found(
        source="Kubernetes",
        why=why,
        process_id=index,
        num_processes=None,
        hint="set JAXDIST_NUM_PROCESSES (all pods) and JAXDIST_COORDINATOR (JOB-0.SERVICE:PORT) in the manifest; for "
        "pods that train each for itself JAXDIST_NUM_PROCESSES=1 and JAXDIST_PROCESS_ID=0",
        host=host,
        port=PORTS[0],  # each pod has an address of its own
    )


def skypilot(environ: Environ) -> Found | None:
    """A node of a SkyPilot task."""
    rank, hosts = whole(environ, "SKYPILOT_NODE_RANK"), environ.get("SKYPILOT_NODE_IPS", "").split()
    if rank is None or not hosts:
        return None
    return Found(
        source="SkyPilot",
        why=f"SKYPILOT_NODE_RANK={rank}, {len(hosts)} SKYPILOT_NODE_IPS",
        process_id=rank,
        num_processes=len(hosts),
        hint="set JAXDIST_COORDINATOR=HOST:PORT, HOST being the first node's",
        host=hosts[0],
        port=hashed_port(environ.get("SKYPILOT_TASK_ID", "")),
    )


# mpirun inside an allocation starts its daemons by srun: their SLURM variables say nothing of its ranks.
SOURCES: tuple[Callable[[Environ], Found | None], ...] = (torchrun, open_mpi, pmi, slurm, kubernetes, skypilot)


def why_single(environ: Environ) -> str:
    """Why this is one process. Raises UserError where half of the variables of many are set."""
    num_tasks = environ.get("SLURM_NTASKS")
    if (whole(environ, "WORLD_SIZE") or 1) > 1:
        raise UserError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} set, but not RANK: torchrun sets both; unset it for one process"
        )
    if "SLURM_JOB_ID" in environ:
        where = f"in SLURM job {environ['SLURM_JOB_ID']}, but not started by srun (no SLURM_STEP_NODELIST)"
        return where + (f": srun would start {num_tasks} tasks" if num_tasks not in (None, "1") else "")
    return "no variables of a launcher"
