"""What goes on when a process is lost: a batch that fills up, a state copied from any layout to any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.data.loader import Loader
from jaxdist.elastic import Snapshots
from jaxdist.mesh import from_this_process
from jaxdist.models.build import build_task
from jaxdist.runtime.topology import Topology
from jaxdist.sync.loop import VOTES
from jaxdist.sync.strategy import build

CONFIG = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.1, "clip_norm": 1.0},
    "train": {"global_batch_size": 30, "accumulation_steps": 2, "budget": {"steps": 3}},
}


def losses(devices: int, *, fill: bool, **overrides: object) -> list[float]:
    config = load({**CONFIG, **overrides}, []).config
    data = build_data(config.data, config.seed)
    strategy = build(
        config,
        Topology(1, 0, jax.devices()[:devices]),
        build_task(config.model, data.info),
        data,
        elastic=8 if fill else None,
    )
    state, step, found = strategy.init_state(), strategy.lower().compile(), []
    votes = from_this_process(strategy.mesh, [0.0] * len(VOTES))
    with Loader(data.train, strategy.batch_sharding, 30, 2, fill=fill) as loader:
        for _ in range(3):
            state, metrics = step(state, next(loader), votes)
            named = dict(zip(strategy.functions.names, np.asarray(metrics).tolist(), strict=True))
            assert named["weight"] == 30
            found.append(named["loss"])
    return found


@pytest.mark.parametrize("devices", [4, 7, 8])  # 15 samples a microbatch: 16, 21 and 16 rows
def test_a_batch_that_the_devices_do_not_divide_is_filled_up_and_its_mean_is_exact(devices: int):
    np.testing.assert_allclose(losses(devices, fill=True), losses(1, fill=False), rtol=1e-5)


def test_rows_that_do_not_count_are_refused_where_they_would_enter_batch_statistics():
    model = {"kind": "cnn", "channels": [4], "hidden": 8, "batch_norm": True}
    with pytest.raises(UserError, match="does not split over 4 workers"):
        losses(4, fill=True, model=model)


def test_a_copy_of_the_state_is_put_on_any_other_layout():
    four = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    two = Mesh(np.array(jax.devices()[4:6]), ("data",))
    numbers = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    state = {
        "split": jax.device_put(numbers, NamedSharding(four, P("fsdp"))),
        "whole": jax.device_put(numbers, NamedSharding(four, P())),
        "key": jax.device_put(jax.random.key(7), NamedSharding(four, P())),
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(two, P())), state)
    snapshots = Snapshots()
    for step in (10, 20, 30):
        snapshots.take(step, state, {"step": step})
    assert snapshots.steps == [20, 30]  # memory for two
    jax.tree.map(lambda x: x.delete(), state)
    found, meta = snapshots.put(20, like)
    assert meta == {"step": 20}
    np.testing.assert_array_equal(found["split"], numbers)
    np.testing.assert_array_equal(found["whole"], numbers)
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(7)))
    assert all(x.sharding.device_set == set(jax.devices()[4:6]) for x in jax.tree.leaves(found))
