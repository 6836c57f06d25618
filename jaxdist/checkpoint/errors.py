"""What can go wrong while saving."""

from pathlib import Path

from jaxdist.runtime.exit_codes import Restartable


class CheckpointFailed(RuntimeError):
    """A checkpoint was not saved; nothing of it is left, and the earlier ones are untouched."""


class CheckpointDiskFull(Restartable):
    """The disk was full while saving; nothing of the checkpoint is left, the earlier ones are untouched."""


def save_error(step: int, directory: Path, cause: str, disk_full: bool) -> Exception:
    if disk_full:
        return CheckpointDiskFull(
            f"no space left on the disk while saving checkpoint {step} to {directory}: nothing half-written "
            "is left, the earlier checkpoints are untouched; free some space and run the same command again"
        )
    return CheckpointFailed(f"checkpoint {step} was not saved to {directory}: {cause}")
