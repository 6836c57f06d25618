"""What a launcher starts for the synchronous strategy; without jax, which a launcher does not need."""

from jaxdist.runtime.role import Role


def roles(processes: int, devices_per_process: int | None, elastic: str = "restart") -> list[Role]:
    """Ranks that live and die together, or with `elastic="shrink"` go on with one less."""
    return [Role("rank", processes, devices_per_process, "shrink" if elastic == "shrink" else "end_job")]
