"""What the servers do: how long an update takes beside the transfers that it is made of, and pushes per second.

    python benchmarks/parameter_server/servers.py DIRECTORY [--seconds 15] [--workers 8] [--servers 1 2 4]

An update is SGD's on 64 MiB of float32; rounds of it and of pushes and pulls of the same size over TCP take turns.
Pushes per second are of whole jobs of real processes (`jaxdist launch`), of a model of 1 MB whose gradient costs next
to nothing. Leaves DIRECTORY/DATE-servers.log and DATE-servers.md.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "single")]
os.environ["JAX_PLATFORMS"] = "cpu"

from page import facts, table  # noqa: E402
from transport import start  # noqa: E402
from transport_contenders import CONTENDERS  # noqa: E402

LEAVES, MEBIBYTES = 16, 64
PARAMETERS = 250_000  # of the model of the jobs, in ten leaves
CONFIG: dict[str, Any] = {
    "name": "pushes",
    "model": {"target": "servers:task"},
    "data": {"target": "servers:data"},
    "optimizer": {"kind": "sgd", "learning_rate": 1.0e-3},
    "checkpoint": {"every": None, "keep_best": None},
    "telemetry": {"log_every": 20, "progress": "none"},
}


class Light:
    """A task whose gradient costs next to nothing: every parameter's is the sample."""

    def init(self, key: Any) -> tuple[Any, Any]:
        import jax.numpy as jnp

        del key
        return {f"layer_{i}": {"kernel": jnp.zeros((50, PARAMETERS // 500))} for i in range(10)}, {}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        import jax

        del key
        total = sum(leaf.sum() for leaf in jax.tree.leaves(params)) / PARAMETERS
        return (total * batch["x"][:, 0] * batch["weight"]).sum(), batch["weight"].sum(), ({}, model_state)

    def predict(self, params: Any, model_state: Any, batch: Any) -> Any:
        del model_state
        return batch["x"] * params["layer_0"]["kernel"][0, 0]


def task(**_: Any) -> Light:
    return Light()


def data() -> Any:
    import numpy as np

    from jaxdist.data.arrays import Arrays

    return Arrays({"x": np.ones((4096, 1), np.float32)})


def updates() -> Any:
    """A function that makes one update of a server's parameters and returns its seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxdist.config.compression import GradientCompression
    from jaxdist.leaves import leaves_of
    from jaxdist.parameter_server.contracts import Contribution
    from jaxdist.parameter_server.formats import build_formats
    from jaxdist.parameter_server.partition import partition
    from jaxdist.parameter_server.store import JaxStore

    size = (MEBIBYTES << 20) // 4 // LEAVES
    params = {f"layer_{i}": {"kernel": jnp.zeros((1024, size // 1024))} for i in range(LEAVES)}
    formats = build_formats(GradientCompression(), leaves_of(params), (), partition(params, 1), seed=0)
    store = JaxStore(params, (), optax.sgd(0.1), formats.shards[0])
    gradient = [np.asarray(array) for array in jax.tree.leaves(jax.tree.map(jnp.ones_like, params))]

    def update() -> float:
        version = store.version
        one = Contribution("worker-0", 1, version, 32.0, 0, version, 1.0, gradient)
        began = time.perf_counter()
        store.apply([one], version + 1, version)
        jax.block_until_ready(store.capture().params)
        return time.perf_counter() - began

    return update


def job(servers: int, workers: int, seconds: float, consistency: str, log: Any) -> dict[str, float]:
    """Pushes per second of a job of real processes, from its second record to its last, and what it says itself."""
    import yaml

    with tempfile.TemporaryDirectory() as temporary:
        strategy = {"kind": "parameter_server", "servers": servers, "workers": workers, "worker_batch_size": 1}
        strategy |= {"consistency": {"kind": consistency}, "durability": "memory"}
        config = {**CONFIG, "strategy": strategy, "train": {"budget": {"seconds": seconds}}}
        path = Path(temporary) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "jaxdist", "launch", "--", "train", str(path), f"run.dir={temporary}/run"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        records = [json.loads(line) for line in (Path(temporary) / "run/metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "pushes.applied" in record]
    first, last = records[1], records[-1]
    decided = [record["pushes.applied"] + record["pushes.discarded"] for record in (first, last)]
    measured = {
        "pushes_per_second": (decided[1] - decided[0]) / (last["seconds"] - first["seconds"]),
        "discarded": last["pushes.discarded"] / decided[1],
        "blocked": last["blocked_fraction"],
        "load": os.getloadavg()[0],
    }
    print(json.dumps({"servers": servers, "workers": workers, "consistency": consistency, **measured}), file=log)
    return measured


def share(rounds: int, log: Any) -> list[str]:
    """Rows of the table of an update beside its transfers, in milliseconds."""
    update, moved = (
        updates(),
        start("jaxdist TCP", CONTENDERS["jaxdist TCP"][2] | {"bytes": MEBIBYTES << 20}, sys.executable),
    )
    assert moved.stdin is not None
    assert moved.stdout is not None
    for _ in range(3):
        update()
    took: dict[str, list[float]] = {"update": [], "push": [], "pull": []}
    for number in range(rounds):
        seconds = {"update": [update() for _ in range(4)]}
        print(4, file=moved.stdin, flush=True)
        seconds |= {way: times for way, times in json.loads(moved.stdout.readline()).items() if way != "cpu"}
        print(json.dumps({"round": number, "load": os.getloadavg()[0], **seconds}), file=log)
        for name, values in seconds.items():
            took[name].append(1e3 * statistics.median(values))
    moved.communicate()
    parts = [u / (a + b) for u, a, b in zip(took["update"], took["push"], took["pull"], strict=True)]
    middle = [f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in took.values()]
    return [*middle, f"{statistics.median(parts):.0%} ({min(parts):.0%} to {max(parts):.0%})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each job's training")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    machine, date = facts(gpu=False), datetime.date.today().isoformat()
    with (args.directory / f"{date}-servers.log").open("w") as log:
        updated = share(args.rounds, log)
        jobs = [
            (servers, kind, job(servers, args.workers, args.seconds, kind, log))
            for kind in ("async", "bsp")
            for servers in args.servers
        ]
    rows = [
        [kind, str(servers), *(f"{found[name]:{form}}" for name, form in
                               (("pushes_per_second", ".0f"), ("discarded", ".1%"), ("blocked", ".0%")))]
        for servers, kind, found in jobs
    ]  # fmt: skip
    text = f"""# What servers do, {date}

- Command: `python benchmarks/parameter_server/servers.py DIRECTORY --seconds {args.seconds:g}`
{chr(10).join(f"- {name}: {value}" for name, value in machine.items())}
- Raw log: [{date}-servers.log]({date}-servers.log)

## An update beside its transfers

SGD on {MEBIBYTES} MiB of float32 in {LEAVES} arrays, and a push and a pull of as much over loopback TCP, in turns:
milliseconds, medians over {args.rounds} rounds, in brackets the least and the most. An update makes new
arrays, as those of the version before may still be being sent: two are read and one is written.

{table(["update", "push", "pull", "update / (push + pull)"], [updated])}

## Pushes per second

{args.workers} workers and the servers as real processes on this machine, a model of {PARAMETERS * 4 / 1e6:g} MB
in ten arrays whose gradient costs next to nothing, tensors through shared memory. Each push comes with a pull. All
processes share {os.cpu_count()} cores, so that more servers have no more to work with here.

{table(["consistency", "servers", "pushes/s", "discarded", "workers blocked"], rows)}
"""
    (args.directory / f"{date}-servers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    from jaxdist.runtime.allocator import SETTINGS, kept_buffers

    if not kept_buffers():  # as the program starts itself
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": SETTINGS})
    main()
