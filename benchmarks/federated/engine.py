"""Rounds of federated averaging: the packed engine beside one jit call a batch, the way of FedJAX.

100 clients, 10 a round, one epoch of batches of 20, SGD 0.1, an MLP of one hidden layer of 200 units:

    equal    784 features, 600 samples of each client
    ragged   784 features, log-normal sizes (median 400, sigma 0.9), 20 to 4,000
    digits   64 features, 15 samples of each client, a single step

Rank by CPU seconds a round, which other programs on the machine disturb least. Each case runs in a process of its
own, the two ways in turn: `python benchmarks/federated/engine.py [--devices 2] [--rounds 40] [CASE ...]`.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from setting import BATCH, CLIENTS, COHORT, HIDDEN, RATE, WARM

CASES = ("equal", "ragged", "digits")


def clients(case: str, directory: str | None = None):
    """(x, y, offsets) of all clients behind one another: of that directory, or with labels of a linear teacher."""
    import numpy as np

    if directory is not None:
        return tuple(np.load(Path(directory) / f"{name}.npy") for name in ("x", "y", "offsets"))
    draw = np.random.default_rng(0)
    sizes = {
        "equal": np.full(CLIENTS, 600),
        "ragged": np.clip(draw.lognormal(np.log(400), 0.9, CLIENTS), 20, 4000).astype(int),
        "digits": np.full(CLIENTS, 15),
    }[case]
    features = 64 if case == "digits" else 784
    x = draw.normal(size=(sizes.sum(), features)).astype(np.float32)
    y = (x @ draw.normal(size=(features, 10))).argmax(1).astype(np.int32)
    return x, y, np.concatenate([[0], np.cumsum(sizes)])


def perceptron(features: int):
    from jaxdist.models.build import module_task
    from jaxdist.models.mlp import MLP

    return module_task(lambda rngs: MLP(features, [HIDDEN], 10, rngs=rngs), classes=10)


def packed(data, rounds: int, devices: int):
    """One entry a round: nothing."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh

    from jaxdist.data.arrays import Arrays
    from jaxdist.federated.algorithm import fedavg
    from jaxdist.federated.client import Trainer
    from jaxdist.federated.cohort import Cohort, uniform
    from jaxdist.federated.engine import Engine
    from jaxdist.federated.feed import Feed, rounds_of
    from jaxdist.federated.schedule import Plan

    x, y, offsets = data
    task, mesh = perceptron(x.shape[1]), Mesh(np.asarray(jax.devices()), ("clients",), axis_types=(AxisType.Auto,))
    plan = Plan(0, offsets, BATCH, 1, None, 8, COHORT)
    trainer = Trainer(task, fedavg(), optax.sgd, (), ("accuracy",))
    engine = Engine(
        trainer, lambda r: RATE, optax.sgd(1.0), mesh, CLIENTS, 8, plan.slots_per_lane, seed=0, resident=True
    )
    feed = Feed(
        plan,
        rounds_of(lambda r: Cohort(uniform(0, r, CLIENTS, COHORT))),
        Arrays({"x": x, "y": y}),
        np.arange(len(x)),
        mesh,
        16 if len(x) == 15 * CLIENTS else 512,
        resident=True,
    )
    state = jax.device_put(
        engine.initial_state(*task.init(jax.random.key(0))), jax.sharding.NamedSharding(mesh, jax.P())
    )
    programs, votes, carry = {}, feed.placed(np.zeros((devices, 1), np.float32), jax.P("clients")), None
    for now in feed.dispatches(0, rounds):
        ends = (now.begins, now.ends)
        if ends not in programs:
            programs[ends] = jax.jit(engine.program(*ends), donate_argnums=(0, 1) if now.ends else 1)
        out = programs[ends](state, carry, now.data, now.chunk, now.clients, votes)
        carry, state = (None, out[0]) if now.ends else (out, state)
        if now.ends:
            yield state


def call_by_call(data, rounds: int, devices: int):
    """A jit call for each batch of each client, which the host gathers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdist.federated.cohort import uniform

    x, y, offsets = data
    task = perceptron(x.shape[1])
    params, model_state = task.init(jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(own, batch, key):
        def mean_loss(own):
            loss_sum, weight, _ = task.loss(own, model_state, batch, key)
            return loss_sum / weight

        return jax.tree.map(lambda w, g: w - RATE * g, own, jax.grad(mean_loss)(own))

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, own, start, weight):
        return jax.tree.map(lambda t, w, s: t + weight * (s - w), total, own, start)

    apply = jax.jit(lambda start, total, weight: jax.tree.map(lambda s, t: s - t / weight, start, total))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    key = jax.random.key(0)
    for round_ in range(rounds):
        total, weight = jax.tree.map(jnp.zeros_like, params), 0.0
        for client in uniform(0, round_, CLIENTS, COHORT):
            size = offsets[client + 1] - offsets[client]
            order = offsets[client] + np.random.default_rng((round_, client)).permutation(size)
            own = copy(params)
            for start in range(0, size, BATCH):
                rows = order[start : start + BATCH]
                counts = (np.arange(BATCH) < len(rows)).astype(np.float32)
                rows = np.resize(rows, BATCH)
                batch = {"x": x[rows], "y": y[rows], "weight": counts, "sample_id": rows.astype(np.int32)}
                own = step(own, batch, key)
            total, weight = add(total, own, params, float(size)), weight + float(size)
        params = apply(params, total, weight)
        yield params


def measure(way: str, data, rounds: int, devices: int, weights: str | None) -> dict[str, float]:
    import jax
    import numpy as np

    begin = time.perf_counter()
    for i, state in enumerate({"packed": packed, "call by call": call_by_call}[way](data, rounds + WARM, devices)):
        if i == WARM - 1:
            jax.block_until_ready(state)
            wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(state)
    seconds, used = time.perf_counter() - wall, time.process_time() - cpu
    if weights is not None:
        leaves = jax.tree.leaves(getattr(state, "params", state))  # by name
        np.savez(weights, **dict(zip(("b1", "w1", "b2", "w2"), map(np.asarray, leaves), strict=True)))
    return {
        "rounds_per_second": rounds / seconds,
        "cpu_ms_per_round": 1e3 * used / rounds,
        "seconds_before": wall - begin,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all by default")
    parser.add_argument("--devices", type=int, default=1, help="emulated CPU devices of the packed engine")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=1, help="times that each is measured, in turn")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--data", metavar="DIRECTORY", help=argparse.SUPPRESS)
    parser.add_argument("--weights", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, case = args.one
        print(json.dumps(measure(way, clients(case, args.data), args.rounds, args.devices, args.weights)))
        return
    print("| case | way | rounds/s | CPU ms/round | seconds before the first timed | load |")
    print("|---|---|---|---|---|---|")
    for case in args.cases or CASES:
        for _ in range(args.repeat):
            for way in ("packed", "call by call"):
                devices = args.devices if way == "packed" else 1
                command = [sys.executable, __file__, "--one", way, case, "--devices", str(devices)]
                command += ["--rounds", str(args.rounds)]
                environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                m = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {case} | {way} | {m['rounds_per_second']:.1f} | {m['cpu_ms_per_round']:.2f} | "
                    f"{m['seconds_before']:.1f} | {m['load']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
