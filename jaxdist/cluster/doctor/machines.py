"""What is judged of the machines themselves: pure functions of what every rank saw."""

from collections.abc import Iterator
from typing import Any

from jaxdist.cluster.doctor.findings import Finding, Level, Ranks, by_value, known, spans

_MUST_AGREE = {"jax", "jaxlib", "jaxdist", "jax-cuda12-plugin", "jax-cuda13-plugin"}  # they speak to each other
_DOCKER_SHM = 64 * 2**20  # what Docker gives a container, and NCCL finds too little
_LINUX_OPEN_FILES = 1024  # what Linux gives a process unless told otherwise


def versions(ranks: Ranks) -> Iterator[Finding]:
    found = {rank: dict(all_of) for rank, all_of in known(ranks, "versions")}
    for rank, seen in known(ranks, "gpus"):
        if seen["driver"]:
            found.setdefault(rank, {})["NVIDIA driver"] = seen["driver"]
    alike = []
    for name in dict.fromkeys(name for all_of in found.values() for name in all_of):
        values = by_value({rank: all_of.get(name, "none") for rank, all_of in found.items()})
        if len(values) == 1:
            alike.append(f"{name} {next(iter(values))}")
            continue
        said = "; ".join(f"{value} on {spans(of)}" for value, of in values.items())
        level: Level = "problem" if name in _MUST_AGREE else "warning"
        odd = tuple(rank for of in list(values.values())[1:] for rank in of)
        yield Finding(level, "versions", f"{name} differs: {said}; install one version everywhere", odd)
    if alike:
        yield Finding("ok", "versions", ", ".join(alike), tuple(found))


def devices(ranks: Ranks) -> Iterator[Finding]:
    found = dict(known(ranks, "devices"))
    for rank, seen in found.items():
        kinds = by_value(dict(enumerate(seen["kinds"])))
        text = ", ".join(f"{len(of)} x {kind}" for kind, of in kinds.items()) + f" ({seen['platform']})"
        expected = ranks[rank].get("expected_devices")
        if expected is not None and expected != len(seen["kinds"]):
            why = "look at what was asked of the scheduler, CUDA_VISIBLE_DEVICES and JAX_PLATFORMS"
            yield Finding("problem", "devices", f"JAX uses {text}, {expected} were expected: {why}", (rank,))
        else:
            yield Finding("ok", "devices", text, (rank,))
    for what, of in (
        ("number of devices", {rank: len(seen["kinds"]) for rank, seen in found.items()}),
        ("kind of device", {rank: ", ".join(sorted(set(seen["kinds"]))) for rank, seen in found.items()}),
    ):
        values = by_value(of)
        if len(values) > 1:
            said = "; ".join(f"{value} on {spans(those)}" for value, those in values.items())
            yield Finding("warning", "devices", f"{what} differs: {said}; every step waits for the slowest")
    for host in dict.fromkeys(host for _, host in known(ranks, "host")):
        yield from _gpus_of_host({r: f for r, f in ranks.items() if f.get("host") == host and "devices" in f})


def _gpus_of_host(ranks: Ranks) -> Iterator[Finding]:
    """GPUs that are there against those that JAX uses. A rank may see only its own: SLURM hides the others."""
    there = {gpu for _, seen in known(ranks, "gpus") for gpu in seen["ids"]}
    if not there:
        return
    here = tuple(ranks)
    used = 0
    for rank, seen in known(ranks, "devices"):
        if seen["platform"] == "cpu":
            yield _unused_by_jax(ranks[rank], len(there), rank)
            return
        used += len(seen["kinds"])
    if used > len(there):
        text = (
            f"{len(here)} processes use {used} GPUs of {len(there)}: each takes those of others; start one process a "
            "host, or give each its own by JAXDIST_LOCAL_DEVICE_IDS or CUDA_VISIBLE_DEVICES"
        )
        yield Finding("problem", "devices", text, here)
    elif used < len(there):
        text = f"{used} of {len(there)} GPUs used: {_why_fewer(ranks)}"
        yield Finding("warning", "devices", text, here)


def _unused_by_jax(facts: dict[str, Any], count: int, rank: int) -> Finding:
    variables, installed = facts.get("environment", {}), facts.get("versions", {})
    chosen, visible = variables.get("JAX_PLATFORMS", ""), variables.get("CUDA_VISIBLE_DEVICES")
    there = f"{count} GPUs are there, JAX uses the CPU: "
    if chosen and "cuda" not in chosen and "gpu" not in chosen:
        return Finding("warning", "devices", f"{there}JAX_PLATFORMS={chosen} says so; unset it", (rank,))
    if visible is not None and visible in ("", "-1", "NoDevFiles"):
        text = f"{there}CUDA_VISIBLE_DEVICES={visible!r} hides them; unset it, or ask the scheduler for GPUs"
        return Finding("warning", "devices", text, (rank,))
    if not any(name.startswith("jax-cuda") for name in installed):
        return Finding("problem", "devices", f"{there}it has no CUDA plugin; pip install 'jaxdist[cuda13]'", (rank,))
    text = f"{there}its CUDA plugin does not start; JAX_PLATFORMS=cuda python -c 'import jax; jax.devices()' says why"
    return Finding("problem", "devices", text, (rank,))


def _why_fewer(ranks: Ranks) -> str:
    facts = next(iter(ranks.values()))
    own, variables = facts.get("cluster", {}), facts.get("environment", {})
    if own.get("local_device_ids") is not None:
        trap = ""
        if own.get("source") == "SLURM" and len(ranks) == 1:
            trap = "; with one task a node that is one GPU a node: ask for a task for each GPU, or unset it"
        return f"local_device_ids {own['local_device_ids']} say so{trap}"
    if "CUDA_VISIBLE_DEVICES" in variables:
        return f"CUDA_VISIBLE_DEVICES={variables['CUDA_VISIBLE_DEVICES']} says so; unset it to use all"
    return "the scheduler gave only those, or too few processes were started on this host"


def limits(ranks: Ranks) -> Iterator[Finding]:
    for rank, of in known(ranks, "limits"):
        if 0 <= of["open_files"] < _LINUX_OPEN_FILES:
            yield Finding("warning", "limits", f"{of['open_files']} open files at most; ulimit -n 65536", (rank,))
        if of["core"] != 0:
            text = "core files are on: a JAX process that aborts may leave one of 250 MB; ulimit -c 0 turns them off"
            yield Finding("note", "limits", text, (rank,))
        elif of["open_files"] < 0 or of["open_files"] >= _LINUX_OPEN_FILES:
            count = "any number of" if of["open_files"] < 0 else of["open_files"]
            yield Finding("ok", "limits", f"{count} open files, no core files", (rank,))
    for rank, size in known(ranks, "shared_memory"):
        if size <= _DOCKER_SHM:
            text = (
                f"/dev/shm has {size / 2**20:.0f} MiB: too little for NCCL between the GPUs of a host and for data "
                "workers; docker run --shm-size=1g, or an emptyDir of medium Memory there in Kubernetes"
            )
            yield Finding("warning", "limits", text, (rank,))


def memory(ranks: Ranks) -> Iterator[Finding]:
    """Parameters and optimizer state are copied to the host's memory before a checkpoint is written."""
    for host in dict.fromkeys(host for _, host in known(ranks, "host")):
        here = {rank: facts for rank, facts in ranks.items() if facts.get("host") == host}
        needed = sum(state["in_host"] for _, state in known(here, "state"))
        free = min((amount for _, amount in known(here, "memory")), default=None)
        if not needed or free is None:
            continue
        text = f"{gigabytes(free)} free, the state takes up to {gigabytes(needed)} while it is saved"
        if needed > free:
            yield Finding("warning", "memory", f"{text}: more hosts, fsdp, or a larger memory request", tuple(here))
        else:
            yield Finding("ok", "memory", text, tuple(here))


def disk(ranks: Ranks) -> Iterator[Finding]:
    """Where checkpoints go: writable, the same for all, and large enough for those that are kept and the next."""
    for rank, about in known(ranks, "directory"):
        if "error" in about:
            text = f"{about['path']} cannot be written: {about['error']}; give another run.dir"
            yield Finding("problem", "disk", text, (rank,))
    if apart := tuple(rank for rank, sees in known(ranks, "sees_first") if not sees):
        place = ranks[0].get("directory", {}).get("path")
        text = f"does not see what rank 0 writes in {place}; give a run.dir on a file system that all hosts share"
        yield Finding("problem", "disk", text, apart)
    elif several := [rank for rank, _ in known(ranks, "sees_first")][1:]:
        yield Finding("ok", "disk", "every rank sees the same directory", (0, *several))
    free = min((about["free"] for _, about in known(ranks, "directory")), default=None)
    for _, state in sorted(known(ranks, "state"))[:1]:
        needed = state["all"] * (state["kept"] + 1)
        if free is None:
            continue
        there = free + state["saved"]
        text = (
            f"{gigabytes(there)} for checkpoints; {state['kept']} that are kept and the next one take "
            f"{gigabytes(needed)} ({gigabytes(state['all'])} each)"
        )
        fits = needed <= there
        way_out = "" if fits else "; free some, lower checkpoint.keep, or move run.dir"
        values = {"needed": needed, "free": there}
        yield Finding("ok" if fits else "problem", "disk", text + way_out, (), values)


def compile_cache(ranks: Ranks) -> Iterator[Finding]:
    for rank, about in known(ranks, "compile_cache"):
        if about is not None and "error" in about:
            text = f"{about['path']}: {about['error']}; every start compiles anew: set telemetry.compile_cache"
            yield Finding("warning", "compile", text, (rank,))


def not_seen(ranks: Ranks) -> Iterator[Finding]:
    """Facts that could not be had. What JAX failed at is a problem, what the machine does not tell is not."""
    for rank, errors in known(ranks, "errors"):
        for name, why in errors.items():
            if name in ("devices", "state", "all_reduce"):
                said = {"devices": "JAX could not start", "state": "this config cannot be built here"}
                yield Finding("problem", name.replace("_", "-"), f"{said.get(name, 'failed')}: {why}", (rank,))
            else:
                yield Finding("note", name.replace("_", " "), f"could not look: {why}", (rank,))


def gigabytes(amount: int) -> str:
    return f"{amount / 1e9:,.3g} GB"


CHECKS = (versions, devices, limits, memory, disk, compile_cache, not_seen)
