"""Checkpoints: what is saved comes back, on any mesh; the right ones are kept; misfits are named."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.checkpoint import Checkpointer, CheckpointFailed, from_canonical, read, to_canonical
from jaxdist.checkpoint.retention import kept
from jaxdist.config.base import better
from jaxdist.config.checkpoint import Checkpoint, KeepBest
from jaxdist.config.errors import UserError


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def whole_state(mesh: Mesh) -> dict:
    """Every kind of leaf and container that a training state may hold."""
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    numbers = np.random.default_rng(0)
    params = {
        "blocks": [{"kernel": jax.device_put(numbers.normal(size=(16, 8)).astype(np.float32), rows)}],
        "half": jax.device_put(jnp.asarray(numbers.normal(size=(8, 4)), jnp.bfloat16), rows),
    }
    # As the training loop does: initialised under jit, straight into shardings.
    opt_state = jax.jit(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init)(params)
    return {
        "params": params,
        "opt_state": jax.device_put(opt_state, everywhere),
        "model_state": {},
        "absent": None,
        "step": jax.device_put(jnp.int32(7), everywhere),
        "bits": jax.device_put(np.arange(8, dtype=np.uint32) + np.uint32(2**31), rows),
        "mask": jax.device_put(jnp.arange(8) % 3 == 0, rows),
        "nothing": jax.device_put(jnp.zeros((0, 4)), everywhere),
        "key": jax.device_put(jax.random.key(3), everywhere),
        "keys": jax.device_put(jax.random.split(jax.random.key(4, impl="rbg"), 8), rows),
    }


def like(tree, mesh=None, spec=None):
    """`tree` abstract; on `mesh`, if given, with every leaf of a first axis of 8 or 16 sharded as `spec`."""

    def leaf_like(leaf):
        sharding = leaf.sharding
        if mesh is not None:
            shards = leaf.ndim and leaf.shape[0] in (8, 16)
            sharding = NamedSharding(mesh, P(*spec[: leaf.ndim]) if shards else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(leaf_like, tree)


def bits(leaf) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for name, leaf in to_canonical(wanted).items():
        other = to_canonical(got)[name]
        assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype), name
        assert bits(other) == bits(leaf), name


def save(checkpoints, step, tree=None, **kwargs):
    tree = {"params": {"w": jnp.full((4,), step, jnp.float32)}} if tree is None else tree
    checkpoints.save(step, tree, meta={"step": step}, **kwargs)
    checkpoints.wait()


def test_names_come_from_keys_positions_and_fields_alone():
    params = {"blocks": [{"kernel": jnp.ones(2)}]}
    names = set(to_canonical({"params": params, "opt_state": optax.adam(1.0).init(params)}))
    assert names == {
        "params/blocks/0/kernel",
        "opt_state/0/count",
        "opt_state/0/mu/blocks/0/kernel",
        "opt_state/0/nu/blocks/0/kernel",
    }


def test_flat_and_back_is_the_same_tree():
    tree = whole_state(mesh_of(8))
    assert_same(from_canonical(to_canonical(tree), tree), tree)


def test_every_kind_of_leaf_survives_bit_for_bit(tmp_path):
    tree = whole_state(mesh_of(8))
    checkpoints = Checkpointer(tmp_path)
    save(checkpoints, 7, tree, kinds={"params/half": "embedding"})
    restored = checkpoints.restore(7, like(tree))
    assert_same(restored, tree)
    for name, leaf in to_canonical(restored).items():
        wanted = to_canonical(tree)[name]
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name
    # Restored keys must also draw the same, which their bits alone do not say.
    assert jax.random.bits(restored["keys"][1]) == jax.random.bits(tree["keys"][1])
    leaves = checkpoints.manifest(7)["parts"]["trainer"]["leaves"]
    assert leaves["params/half"] == {"shape": [8, 4], "dtype": "bfloat16", "kind": "embedding"}


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_restores_onto_any_number_of_devices(tmp_path, devices):
    tree = whole_state(mesh_of(4))
    save(Checkpointer(tmp_path), 1, tree)
    wanted = like(tree, mesh_of(devices), ("data",))
    restored = Checkpointer(tmp_path).restore(1, wanted)
    assert_same(restored, tree)
    assert restored["params"]["half"].sharding == wanted["params"]["half"].sharding


def test_restores_onto_another_mesh_and_spec(tmp_path):
    tree = whole_state(mesh_of(8))
    save(Checkpointer(tmp_path), 1, tree)
    grid = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    restored = Checkpointer(tmp_path).restore(1, like(tree, grid, ("fsdp", "tensor")))
    assert_same(restored, tree)
    assert restored["params"]["half"].addressable_shards[0].data.shape == (4, 1)


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    """Would catch a background writer that reads memory which the next step already overwrites."""
    mesh = mesh_of(8)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    checkpoints = Checkpointer(tmp_path, keep=10)
    for step, spec in enumerate((P(), P("data"), P(None, "data"))):
        numbers = np.random.default_rng(step).normal(size=(8, 256, 1024)).astype(np.float32)
        state = {"params": jax.device_put(numbers, NamedSharding(mesh, spec))}
        checkpoints.save(step, state, meta={})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        np.testing.assert_array_equal(read(tmp_path, step, prefix="")["params"], numbers)


def test_numpy_leaves_are_copied_before_save_returns(tmp_path):
    state = {"params": np.arange(1 << 20, dtype=np.float64)}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, state, meta={})
    state["params"][:] = -1
    checkpoints.wait()
    np.testing.assert_array_equal(read(tmp_path, prefix="")["params"], np.arange(1 << 20, dtype=np.float64))


def test_save_returns_before_the_checkpoint_is_committed(tmp_path):
    committed = []
    checkpoints = Checkpointer(tmp_path, on_commit=lambda step, seconds: committed.append((step, seconds)))
    state = {"params": jnp.asarray(np.random.default_rng(0).normal(size=(4 << 20,)), jnp.float32)}
    stall = checkpoints.save(1, state, meta={})
    assert checkpoints.steps() == committed == []
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    [(step, seconds)] = committed
    assert step == 1
    assert seconds > stall > 0


def test_a_committed_step_is_not_saved_again(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    save(checkpoints, 5, {"params": jnp.zeros(3)})
    save(checkpoints, 5, {"params": jnp.ones(3)})
    assert read(tmp_path, prefix="")["params"].sum() == 0


def test_two_roles_cannot_share_a_directory_and_destroy_each_others_parts(tmp_path):
    tree = {"x": jnp.arange(3)}
    first, second = Checkpointer(tmp_path, role="shard-0"), Checkpointer(tmp_path, role="shard-1")
    first.save(1, tree, meta={})
    first.wait()
    with pytest.raises(CheckpointFailed, match="part of shard-0"):
        second.save(1, tree, meta={})
    assert first.newest().step == 1


def test_the_newest_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=2, keep_best=KeepBest(metric="eval.loss", number=2))
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 2.5, 2.6], start=1):
        save(checkpoints, step, metrics={"eval.loss": loss})
    assert checkpoints.steps() == [2, 3, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (2, 3, 5, 6)]


def test_best_is_by_its_mode_and_the_newer_of_equals():
    metrics = {1: {"accuracy": 0.9}, 2: {"accuracy": 0.9}, 3: {"accuracy": 0.1}, 4: {}}
    best = KeepBest(metric="accuracy", mode="max")
    assert kept([1, 2, 3, 4], 1, best, metrics) == {2, 4}


def test_nothing_is_deleted_before_the_new_one_is_committed(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1)
    save(checkpoints, 1)
    with pytest.raises(CheckpointFailed, match="checkpoint 2 was not saved"):
        save(checkpoints, 2, {"params": {"w": np.array(["text"])}})
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


def test_the_error_of_a_failed_save_is_raised_by_the_next(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"params": {"w": np.array(["text"])}}, meta={})
    with pytest.raises(CheckpointFailed):
        checkpoints.save(2, {"params": jnp.ones(2)}, meta={})
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]


def test_leaves_that_do_not_fit_are_named(tmp_path):
    tree = {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(3)}}
    checkpoints = Checkpointer(tmp_path)
    save(checkpoints, 1, tree)
    other = {"params": {"kernal": jnp.ones((2, 3)), "bias": jnp.ones(4), "scale": jnp.ones(3, jnp.bfloat16)}}
    with pytest.raises(UserError) as error:
        checkpoints.restore(1, like(other))
    message = str(error.value)
    assert "1 not in the checkpoint: params/kernal (nearest: params/kernel)" in message
    assert "1 only in the checkpoint: params/kernel" in message
    assert "params/bias (saved float32[3], wanted float32[4])" in message
    assert "params/scale (saved float32[3], wanted bfloat16[3])" in message


def test_many_misfits_are_counted(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    save(checkpoints, 1, {"params": [jnp.ones(1)]})
    with pytest.raises(UserError, match=r"29 not in the checkpoint: .* and 24 more"):
        checkpoints.restore(1, like({"params": [jnp.ones(1)] * 30}))


def test_parameters_are_read_without_the_rest(tmp_path):
    tree = whole_state(mesh_of(8))
    save(Checkpointer(tmp_path / "checkpoints"), 3, tree)
    one = mesh_of(1)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step_00000003"):
        arrays = read(path)
        np.testing.assert_array_equal(arrays["blocks"]["0"]["kernel"], tree["params"]["blocks"][0]["kernel"])
        assert isinstance(arrays["half"], np.ndarray)
        assert arrays["half"].dtype == jnp.bfloat16
    assert_same(read(tmp_path, like=like(tree["params"], one, ("data",))), tree["params"])


def test_reading_where_there_is_nothing_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no committed checkpoint"):
        read(tmp_path / "nowhere")
    save(Checkpointer(tmp_path), 1)
    with pytest.raises(UserError, match=re.escape("no leaves below 'parameters/'")):
        read(tmp_path, prefix="parameters/")
    with pytest.raises(UserError, match=r"COMMIT cannot be read.*steps there: 1"):
        read(tmp_path, step=2)


def test_meta_is_given_back(tmp_path):
    meta = {"samples": 640, "seed": 0, "digest": "abc", "seconds": 1.5, "position": {"epoch": 1, "start": 3}}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(9, {"params": jnp.ones(2)}, meta=meta, metrics={"loss": 2.0})
    found = checkpoints.newest()
    assert (found.step, found.meta, found.refused) == (9, meta, [])


def test_the_layout_on_disk_is_canonical(tmp_path):
    save(Checkpointer(tmp_path), 100)
    assert {path.name for path in (tmp_path / "step_00000100").iterdir()} == {
        "COMMIT",
        "manifest.json",
        "trainer",
    }
    manifest = json.loads((tmp_path / "step_00000100" / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"]) == (1, 100)
    part = tmp_path / "step_00000100" / "trainer"
    on_disk = {path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()}
    assert set(manifest["parts"]["trainer"]["files"]) == on_disk


def test_works_where_an_event_loop_already_runs(tmp_path):
    """As in a notebook."""
    import asyncio

    async def cell():
        checkpoints = Checkpointer(tmp_path)
        save(checkpoints, 1)
        return checkpoints.restore(1, like({"params": {"w": jnp.zeros(4)}}))

    assert asyncio.run(cell())["params"]["w"].sum() == 4


def test_keep_best_needs_checkpoints_to_choose_from():
    with pytest.raises(ValueError, match="keep_best has no effect"):
        Checkpoint(keep_best={"metric": "eval.loss"})
    with pytest.raises(ValueError, match="greater than 0"):
        Checkpoint(every=0)
    by_minutes = Checkpoint(every_minutes=5, keep_best={"metric": "eval.loss"})
    assert better(by_minutes.keep_best.metric, by_minutes.keep_best.mode) == "min"
    assert (better("eval.accuracy", None), better("eval.accuracy", "min")) == ("max", "min")
