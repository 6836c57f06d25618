"""Which of its host's GPUs a process uses, where several processes share a host."""

from collections.abc import Mapping
from pathlib import Path

from jaxdist.config.errors import UserError

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def local_devices(
    environ: Mapping[str, str], local_rank: int, local_count: int | None, slurm_gpus: int | None, gpus_on_host: int
) -> tuple[tuple[int, ...] | None, str]:
    """This process's share, as indices into the devices that it sees (None: all of them), and why.

    Args:
      environ: where CUDA_VISIBLE_DEVICES and its like, and JAX_PLATFORMS, are looked up.
      local_rank: of this process among those of its host.
      local_count: processes on its host; None where nothing says so: then one process a GPU.
      slurm_gpus: of the step on this host, if srun started this process. A process that sees fewer got its own.
      gpus_on_host: what the machine has, for when no variable says what this process sees; 0 if that is unknown.

    Raises:
      UserError: if the GPUs cannot be shared out evenly.
    """
    if local_count == 1 or environ.get("JAX_PLATFORMS") == "cpu":
        return None, ""
    variable = next((name for name in _VISIBLE if name in environ), None)
    visible = slurm_gpus or gpus_on_host or None
    if variable is not None:
        visible = len([device for device in environ[variable].split(",") if device.strip() not in ("", "-1")])
        if visible <= 1 or (slurm_gpus is not None and visible < slurm_gpus):
            return None, f"{variable}={environ[variable]} is this process's own"
    count = local_count or visible  # LOCAL_RANK without a count is by convention one process a GPU
    if visible is not None and count is not None and (local_rank >= count or visible % count):
        seen = f"{variable}={environ[variable]}" if variable else "counted"
        raise UserError(
            f"process {local_rank} of {count} on a host with {visible} GPUs ({seen}): no even share for each; "
            "start as many processes as GPUs, or one for all, or give each its own by JAXDIST_LOCAL_DEVICE_IDS"
        )
    share = visible // count if visible and count else 1
    devices = tuple(range(local_rank * share, (local_rank + 1) * share))
    return devices, f"processes of this host: {local_count or 'unknown'}, GPUs: {visible or 'unknown'}"


def nvidia_gpus() -> int:
    """GPUs of this machine, from its device files; 0 where there are none to be seen."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
