"""Programs that are timed in turn: each lives in processes of its own and computes only when told to.

The parent writes `CASE STEPS` to a child's input; the child answers with one line of JSON,
`{"seconds": a step, "value": last loss}`. Two frameworks in one process would fight for the cores with two
thread pools, and the allocator's settings are read when a process starts.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxdist.runtime.allocator import SETTINGS

HERE = Path(__file__).parent
Case = Callable[[int], tuple[float, float]]  # number of steps -> (seconds a step, value of the last)


class Timing(NamedTuple):
    seconds: float  # a step
    value: float  # the loss of the last step, of rank 0


class Contender:
    """Processes that run one script, each on its own share of the cores.

    Args:
      script: in this directory; it ends in `serve`.
      cores: of all its processes together; a process has as many threads as cores.
      kept_buffers: glibc keeps big buffers, as `jaxdist train` asks it to.
      processes: ranks of one job; they find each other by the environment.
    """

    def __init__(
        self,
        name: str,
        script: str,
        arguments: list[str],
        cores: list[int],
        *,
        kept_buffers: bool,
        processes: int = 1,
    ):
        self.name = name
        share, port = len(cores) // processes, _free_port()
        assert share > 0, f"{processes} processes on {len(cores)} cores"
        self._processes = [
            _start(
                [sys.executable, str(HERE / script), *arguments],
                cores[rank * share : (rank + 1) * share],
                {
                    **(_rank_environment(port, processes, rank) if processes > 1 else {}),
                    **({"GLIBC_TUNABLES": SETTINGS} if kept_buffers else {}),
                },
            )
            for rank in range(processes)
        ]
        answers = [self._answer(process) for process in self._processes]
        self.about: dict[str, Any] = answers[0]["about"]
        self.cases: list[str] = answers[0]["cases"]

    def time(self, case: str, steps: int) -> Timing:
        """Seconds a step of the slowest rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{case} {steps}\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        return Timing(max(answer["seconds"] for answer in answers), answers[0]["value"])

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {process.wait()}; what it said is above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # the end of its input is the end of `serve`
        for process in self._processes:
            process.wait()


def claim_stdout() -> int:
    """The descriptor that answers go to. What libraries print goes to stderr from now on."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def serve(answers: int, about: dict[str, Any], cases: dict[str, Case]) -> None:
    """Be a child: say that all is built, then time what is asked for until the input ends."""
    with os.fdopen(answers, "w") as out:
        print(json.dumps({"about": about, "cases": list(cases)}), file=out, flush=True)
        for line in sys.stdin:
            case, steps = line.split()
            print(json.dumps(Timing(*cases[case](int(steps)))._asdict()), file=out, flush=True)


def _start(command: list[str], cores: list[int], variables: dict[str, str]) -> "subprocess.Popen[str]":
    threads = str(len(cores))
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **variables}
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # a child inherits it; both frameworks size their pools by it
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        os.sched_setaffinity(0, own)


def _rank_environment(port: int, processes: int, rank: int) -> dict[str, str]:
    count, index = str(processes), str(rank)
    ours = ("JAXDIST_COORDINATOR", "JAXDIST_NUM_PROCESSES", "JAXDIST_PROCESS_ID")
    return {
        **dict(zip(ours, (f"127.0.0.1:{port}", count, index), strict=True)),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "RANK": index},
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
