"""What a launcher starts."""

from dataclasses import dataclass
from typing import Literal

RENDEZVOUS, TOKEN = "JAXDIST_RENDEZVOUS", "JAXDIST_JOB_TOKEN"  # of the environment of a node that talks over TCP


@dataclass(frozen=True)
class Role:
    """Processes of one kind.

    `on_exit` says what becomes of the job when one of them fails: `end_job`, all end (and those of this role are one
    `jax.distributed` job); `shrink`, the others of that job go on without it, unless it is the first, which holds
    JAX's coordinator; `restart`, that one is started again alone; `ignore`, the others go on without it.
    """

    name: str
    count: int
    devices: int | None  # accelerators of each process; None: all it sees; 0: it computes on the processor
    on_exit: Literal["end_job", "shrink", "restart", "ignore"] = "end_job"
    ends_job: bool = False  # with `restart`: the job has ended when these have, in good order
    first: int = 0  # index of the first: a role may be of unlike processes
