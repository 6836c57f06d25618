"""A process of its own for the tests of checkpoints: `python checkpoint_process.py WHAT DIRECTORY ...`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.checkpoint import CheckpointDiskFull, Checkpointer, CheckpointFailed

ROWS = 1024  # of "replicated": 4 MiB, large enough for its holders to share the writing


def mesh() -> Mesh:
    devices = jax.devices()
    return Mesh(np.array(devices).reshape(2, -1) if len(devices) > 1 else np.array([devices]), ("fsdp", "tensor"))


def numbers(step: int) -> dict:
    draw = np.random.default_rng(step).normal
    return {
        "params": {
            "sharded": draw(size=(8, 64)).astype(np.float32),
            "rows": draw(size=(16, 3)).astype(np.float32),
            "replicated": draw(size=(ROWS, 1024)).astype(np.float32),
        },
        "step": np.int32(step),
        "nothing": np.zeros((0, 3), np.float32),
    }


SPECS = {
    "params": {"sharded": P("fsdp", "tensor"), "rows": P("tensor"), "replicated": P()},
    "step": P(),
    "nothing": P(),
}


def state(step: int) -> dict:
    def globally(value, spec):
        sharding = NamedSharding(mesh(), spec)
        return jax.make_array_from_callback(np.shape(value), sharding, lambda index: np.asarray(value)[index])

    return {
        **jax.tree.map(globally, numbers(step), SPECS),
        "key": jax.jit(jax.random.key, out_shardings=NamedSharding(mesh(), P()))(step),
    }


def like() -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def assert_holds(restored: dict, step: int) -> None:
    """Every shard that this process has is what was saved, on the mesh of this job."""
    wanted = jax.tree.leaves(numbers(step))
    got = jax.tree.leaves({name: restored[name] for name in numbers(step)})
    for want, have in zip(wanted, got, strict=True):
        assert len(have.sharding.device_set) == jax.device_count()
        for shard in have.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(want)[shard.index])
    for shard in jax.random.key_data(restored["key"]).addressable_shards:
        np.testing.assert_array_equal(shard.data, jax.random.key_data(jax.random.key(step)))


def save(directory: Path) -> None:
    """Three saves, each donated at once, under a main thread that goes on with collectives."""
    step_ahead = jax.jit(lambda x: jax.tree.map(lambda v: v + jnp.sum(v), x), donate_argnums=0)
    committed: list[int] = []
    checkpoints = Checkpointer(directory, keep=2, on_commit=lambda step, _: committed.append(step), timeout=60)
    for step in (1, 2, 3):
        tree = state(step)
        checkpoints.save(step, tree, meta={"step": step})
        params = tree["params"]
        for _ in range(5):
            params = step_ahead(params)
        jax.block_until_ready(params)
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]
    assert committed == ([1, 2, 3] if jax.process_index() == 0 else [])


def restore(directory: Path) -> None:
    checkpoints = Checkpointer(directory, timeout=60)
    found = checkpoints.newest()
    assert found is not None
    assert found.meta == {"step": found.step}
    assert_holds(checkpoints.restore(found.step, like()), found.step)
    print(f"restored {found.step} refused {found.refused}")


def fail(directory: Path) -> None:
    """The last process alone cannot write: every process must learn of it, soon, and go on."""
    from jaxdist.checkpoint import checkpointer

    begin = checkpointer.begin_write

    def full(part, flat):
        begin(part, flat)(60)
        raise OSError(28, "No space left on device")

    checkpoints = Checkpointer(directory, timeout=60)
    if jax.process_index() == jax.process_count() - 1:
        checkpointer.begin_write = full
    checkpoints.save(4, state(4), meta={})
    with pytest.raises(CheckpointDiskFull, match="saving checkpoint 4"):
        checkpoints.wait()
    checkpointer.begin_write = begin
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.newest().refused == []
    checkpoints.save(4, state(4), meta={"step": 4})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3, 4]


def loop(directory: Path) -> None:
    """Saves without end, from the step after the newest; to be killed."""
    checkpoints = Checkpointer(directory, keep=2)
    found = checkpoints.newest()
    step = found.step if found else 0
    print("ready", flush=True)
    while True:
        step += 1
        checkpoints.save(step, state(step), meta={"step": step})


def fill(directory: Path) -> None:
    """Saves until the disk is full; says which error that gave, and what is committed."""
    checkpoints = Checkpointer(directory, keep=100)
    try:
        for step in range(1, 100):
            checkpoints.save(step, state(step), meta={"step": step})
            checkpoints.wait()
    except (CheckpointDiskFull, CheckpointFailed) as error:
        print(type(error).__name__, error)


if __name__ == "__main__":
    what, where, *job = sys.argv[1:]
    if job:
        address, count, index = job
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(index), initialization_timeout=60)
    {"save": save, "restore": restore, "fail": fail, "loop": loop, "fill": fill}[what](Path(where))
