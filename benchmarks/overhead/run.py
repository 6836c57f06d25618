"""What jaxdist's training loop costs beside a hand-written one: microseconds a step, in one run.

Both train the same model with the same optimizer on batches of the same shape and dtype. The hand-written
loop is a jitted step on one batch that stays on the device, its result waited for only at the end. jaxdist's
is the whole `train`: data order, loading, the guarded step, metrics read and written, progress lines;
checkpoints are off. The two take turns; pairs are compared, so that a drifting machine does not decide.

    python benchmarks/overhead/run.py [--pairs 9]
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.randomness import key_for
from jaxdist.run import Built, Recorder, open_run_directory
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.strategy import Runtime
from jaxdist.runtime.topology import join
from jaxdist.sync.strategy import build
from jaxdist.telemetry.summary import Stopwatch, versions

WARM_UP = 30  # steps before the clock starts


def config(hidden: list[int], batch: int, steps: int) -> Any:
    return load(
        {
            "name": "overhead",
            "model": {"kind": "mlp", "hidden": hidden},
            "data": {"kind": "synthetic_blobs", "samples": 20_000, "features": 64, "classes": 10},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0},
            "train": {"budget": {"steps": steps}, "global_batch_size": batch, "eval_samples": 32},
            "telemetry": {"progress": "plain"},
        }
    ).config


class NoCheckpoints:
    """In the checkpointer's place: they are off."""

    def save(self, *_: Any, **__: Any) -> float:
        return 0.0

    def wait(self) -> None: ...


def seconds_of_jaxdist(built: Built, steps: int) -> float:
    """A step of `train`, from the dispatch of one step to that of a later one."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as directory, StopFlag() as stop:
        run_config = built.config.model_copy(
            update={"run": built.config.run.model_copy(update={"dir": Path(directory)})}
        )
        run_directory = open_run_directory(run_config, built.topology)
        runtime = Runtime(
            checkpointer=NoCheckpoints(),  # type: ignore[arg-type]
            stopwatch=Stopwatch(),
            stop=stop,
            event=run_directory.event,
            is_first=True,
            on_step=lambda step, unread: times.append(time.perf_counter()),
        )
        with Recorder(run_directory, run_config, built.topology) as recorder:
            recorder.progress.start("overhead", steps)
            for record in built.strategy.run(built.strategy.init_state(), runtime):
                recorder.write(record)
    return (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def seconds_by_hand(built: Built, steps: int) -> float:
    task, strategy = built.task, built.strategy
    optimizer, seed = strategy.optimizer, built.config.seed  # type: ignore[attr-defined]
    params, model_state = jax.jit(task.init)(key_for(seed, "init"))
    opt_state = jax.jit(optimizer.init)(params)
    batch = jax.device_put(built.data.train.at(0, built.config.train.global_batch_size))

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def mean_loss(params: Any) -> Any:
            loss_sum, weight, _ = task.loss(params, model_state, batch, key_for(seed, "dropout"))
            return loss_sum / weight

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(WARM_UP):
        params, opt_state, loss = jitted(params, opt_state, batch)
    loss.block_until_ready()
    started = time.perf_counter()
    for _ in range(steps):
        params, opt_state, loss = jitted(params, opt_state, batch)
    loss.block_until_ready()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    print("versions", versions(), "cpus", os.cpu_count(), "load", os.getloadavg())
    cases: dict[str, tuple[list[int], int, int]] = {
        "short step": ([384, 384], 64, 3000),
        "long step": ([2048, 2048], 512, 60),
    }
    for name, (hidden, batch, steps) in cases.items():
        settings = config(hidden, batch, steps + WARM_UP)
        topology = join()
        data = build_data(settings.data, settings.seed)
        task = build_task(settings.model, data.info)
        built = Built(settings, topology, task, data, build(settings, topology, task, data))
        rows = []
        for pair in range(pairs + 1):
            ours, by_hand = seconds_of_jaxdist(built, steps), seconds_by_hand(built, steps)
            if pair:  # the first pair warms everything up
                rows.append((ours, by_hand))
                print(f"{name}: pair {pair}: jaxdist {ours * 1e6:.1f} us, by hand {by_hand * 1e6:.1f} us a step")
        added = [(a - b) * 1e6 for a, b in rows]
        ratio = [a / b for a, b in rows]
        print(
            f"{name}: by hand {statistics.median(b for _, b in rows) * 1e3:.3f} ms; jaxdist adds a median of "
            f"{statistics.median(added):.1f} us a step (min {min(added):.1f}, max {max(added):.1f}), "
            f"ratio {statistics.median(ratio):.4f}"
        )
        assert np.isfinite(ratio).all()


if __name__ == "__main__":
    main()
