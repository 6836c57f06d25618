"""Which processes make up the job, which of them this is, and where process 0 is to be met.

The first that knows: command line, JAXDIST_*, JAX_*, then the launchers of `cluster_sources.py`; else one process.
A value that an earlier one leaves out comes from a later one, so that `mpirun -x JAXDIST_COORDINATOR=host:port`
or a manifest with JAXDIST_NUM_PROCESSES says only what the launcher cannot.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.runtime.cluster_devices import local_devices, nvidia_gpus
from jaxdist.runtime.cluster_hosts import check_address, join_address
from jaxdist.runtime.cluster_sources import SOURCES, Found, parse_whole, whole, why_single


@dataclass(frozen=True)
class Cluster:
    """The processes of a job, as one of them sees it."""

    coordinator: str | None  # host:port of process 0; None for a single process that was given none
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None  # None: every device that the process sees
    source: str  # who named this process: command line, JAXDIST_*, JAX_*, a launcher, or single process
    why: str  # for the user: what was found, and which variables said so


@dataclass(frozen=True)
class _Given:
    """A value that the user set, and where."""

    value: str
    name: str
    layer: str


_VARIABLES = {
    "JAXDIST_*": {
        "coordinator": "JAXDIST_COORDINATOR",
        "num_processes": "JAXDIST_NUM_PROCESSES",
        "process_id": "JAXDIST_PROCESS_ID",
        "local_device_ids": "JAXDIST_LOCAL_DEVICE_IDS",
    },
    "JAX_*": {
        "coordinator": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
        "local_device_ids": "JAX_LOCAL_DEVICE_IDS",
    },
}
_OPTIONS = {
    "coordinator": "--coordinator",
    "num_processes": "--num-processes",
    "process_id": "--process-id",
    "local_device_ids": "--local-devices",
}
_NEEDED = ("coordinator", "num_processes", "process_id")


def resolve_cluster(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
) -> Cluster:
    """Find the cluster. The arguments are the command line's; what is None or unset is looked for further down.

    Raises:
      UserError: if something is set but not enough, is no number or address, or contradicts something else.
    """
    options = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "local_device_ids": None if local_device_ids is None else ",".join(map(str, local_device_ids)),
    }
    given = _given(environ, options)
    found = None
    if not all(field in given for field in _NEEDED):
        found = next(filter(None, (source(environ) for source in SOURCES)), None)
    devices, why_devices = _given_devices(given), ""
    if found is None and not any(field in given for field in _NEEDED):
        return Cluster(None, 1, 0, devices, "single process", why_single(environ))
    count, process = _count_and_id(given, found)
    address = _coordinator(environ, given, found, count, process)
    if devices is None and found is not None and found.local_rank is not None and count > 1:
        devices, why_devices = local_devices(
            environ, found.local_rank, found.local_count, found.slurm_gpus, nvidia_gpus()
        )
    named = given.get("process_id") or (given["num_processes"] if found is None else None)
    reasons = [found.why if found else "", _names(given.values()), why_devices]
    return Cluster(
        address,
        count,
        process,
        devices,
        source=named.layer if named else found.source if found else "single process",
        why="; ".join(filter(None, reasons)),
    )


def describe(cluster: Cluster) -> str:
    """One line for the user."""
    who = "one process" if cluster.num_processes == 1 else f"process {cluster.process_id} of {cluster.num_processes}"
    met = "" if cluster.coordinator is None else f", process 0 at {cluster.coordinator}"
    ids = cluster.local_device_ids
    uses = "" if ids is None else f", local device{'s' * (len(ids) > 1)} {','.join(map(str, ids))}"
    source = "" if cluster.source == "single process" else f"{cluster.source}: "
    return f"cluster   {source}{who}{met}{uses} ({cluster.why})"


def _given(environ: Mapping[str, str], options: Mapping[str, object]) -> dict[str, _Given]:
    """What the user set, each value from the first layer that has it."""
    given = {
        field: _Given(str(value), _OPTIONS[field], "command line")
        for field, value in options.items()
        if value is not None
    }
    for layer, variables in _VARIABLES.items():
        for field, name in variables.items():
            if environ.get(name):
                given.setdefault(field, _Given(environ[name], name, layer))
    return given


def _given_devices(given: Mapping[str, _Given]) -> tuple[int, ...] | None:
    if "local_device_ids" not in given:
        return None
    text, name = given["local_device_ids"].value, given["local_device_ids"].name
    ids = tuple(parse_whole(part.strip(), name) for part in text.split(","))
    if len(set(ids)) < len(ids):
        raise UserError(f"{name}={text}: names a device twice")
    return ids


def _count_and_id(given: Mapping[str, _Given], found: Found | None) -> tuple[int, int]:
    """How many processes there are, and which this is."""
    count = found.num_processes if found else None
    process = found.process_id if found else None
    numbers = {f: parse_whole(given[f].value, given[f].name) for f in ("num_processes", "process_id") if f in given}
    if count is not None and "process_id" not in given and numbers.get("num_processes", count) != count:
        raise UserError(
            f"{given['num_processes'].name}={numbers['num_processes']}, but {_said(found)} started {count}: "
            "unset the one that is wrong"
        )
    count = numbers.get("num_processes", count)
    process = numbers.get("process_id", 0 if count == 1 and process is None else process)
    if count is None and found is not None:
        raise UserError(
            f"{_said(found)} does not say how many processes there are: {found.hint}; or JAXDIST_NUM_PROCESSES"
        )
    if count is None or process is None:
        raise _incomplete(given)
    if process >= count:
        said = ", ".join([*(value.name for value in given.values()), *([found.why] if found else [])])
        raise UserError(f"process {process} of {count} ({said}): the id must be from 0 to the number less 1")
    return count, process


def _coordinator(
    environ: Mapping[str, str], given: Mapping[str, _Given], found: Found | None, count: int, process: int
) -> str | None:
    """Where process 0 is met."""
    own_port = whole(environ, "JAXDIST_PORT")
    if own_port is not None and not 1 <= own_port <= 65535:
        raise UserError(f"JAXDIST_PORT={own_port}: must be a port, from 1 to 65535")
    if "coordinator" in given:
        name = given["coordinator"].name
        if own_port is not None:
            raise UserError(
                f"JAXDIST_PORT={own_port}: has no effect beside {name}, which has a port; unset one of them"
            )
        return check_address(given["coordinator"].value, name)
    if count == 1:
        return None
    if found is None:
        raise _incomplete(given)
    if process != found.process_id:
        raise UserError(
            f"{given['process_id'].name}={process}, but {_said(found)} calls this process {found.process_id}: "
            "where process 0 is, is then not known; set JAXDIST_COORDINATOR=HOST:PORT, too"
        )
    port = found.port if own_port is None else own_port
    if found.host is None:
        raise UserError(f"{_said(found)} does not say on which host process 0 is: {found.hint}")
    if port is None:
        raise UserError(
            f"{_said(found)} names no job, so that no port is this job's own: "
            "set JAXDIST_PORT to one that is free, the same for all processes"
        )
    if process == 0 and found.here is not None and found.here.split(".")[0] != found.host.split(".")[0]:
        raise UserError(
            f"{_said(found)}: process 0 is on {found.here}, not on {found.host}, where the others would look for it: "
            f"{found.hint}"
        )
    return join_address(found.host, port)


def _said(found: Found | None) -> str:
    assert found is not None
    return f"{found.source} ({found.why})"


def _names(given: Iterable[_Given]) -> str:
    return ", ".join(value.name for value in given)


def _incomplete(given: Mapping[str, _Given]) -> UserError:
    missing = ", ".join(_VARIABLES["JAXDIST_*"][field] for field in _NEEDED if field not in given)
    return UserError(f"{_names(given.values())} set, but not {missing}: set all three, or none for one process")
