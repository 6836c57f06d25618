"""Gradients in parts: summed over the axes of a replica that do not split their leaf, and over no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdist import gather
from jaxdist.config.strategy import workers_of
from jaxdist.leaves import Leaf
from jaxdist.mesh import PART_AXES, build_mesh, by_worker, manual, num_parts, num_workers


def leaf(name: str, spec: P) -> Leaf:
    return Leaf(name=name, kind="matrix", shape=(4, 4), dtype=jnp.float32, stacked=0, spec=spec)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "expert": 2},
        {"data": 1, "fsdp": 2, "stage": 2, "context": 2},
        {"data": 2, "stage": 2, "tensor": 2},
    ],
)
def test_a_gradient_is_summed_over_the_axes_that_do_not_split_its_leaf_and_over_no_other(sizes):
    mesh = build_mesh(sizes, jax.devices())
    leaves = {
        "whole": leaf("whole", P()),
        "rows": leaf("rows", P(("stage", "expert"), None)),
        "columns": leaf("columns", P(None, "fsdp")),
    }
    coordinates = {axis: np.arange(mesh.shape[axis]) for axis in PART_AXES}

    def part() -> jax.Array:  # another number on each device
        number = jnp.zeros(())
        for axis in PART_AXES:
            number = number * mesh.shape[axis] + jax.lax.axis_index(axis)
        return number

    def one_device() -> dict[str, jax.Array]:
        summed = gather.sum_parts({name: part()[None] for name in leaves}, leaves)
        return jax.tree.map(lambda x: x.reshape((1,) * len(PART_AXES)), summed)

    found = jax.jit(manual(one_device, mesh, (), P(*PART_AXES)))()
    numbers = np.arange(num_parts(mesh), dtype=np.float64).reshape([len(coordinates[axis]) for axis in PART_AXES])
    for name, own in leaves.items():
        kept = gather.axes_of(own) | {"data"}
        over = tuple(i for i, axis in enumerate(PART_AXES) if axis not in kept)
        expected = np.broadcast_to(numbers.sum(over, keepdims=True), numbers.shape)
        np.testing.assert_array_equal(np.asarray(found[name]), expected, err_msg=name)


def test_workers_are_the_devices_along_the_batch_axes_and_each_has_those_of_the_other_axes():
    mesh = build_mesh({"data": 2, "stage": 2, "expert": 2}, jax.devices())
    assert num_workers(mesh) == 4 == workers_of(dict(mesh.shape))
    assert num_parts(mesh) == 8
    for devices in by_worker(mesh):
        places = [np.argwhere(mesh.devices == device)[0] for device in devices]
        for axis in ("data", "fsdp", "expert"):
            assert len({place[mesh.axis_names.index(axis)] for place in places}) == 1
        assert len({place[mesh.axis_names.index("stage")] for place in places}) == 2
