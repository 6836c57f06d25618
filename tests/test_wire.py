"""Bytes on the wire, read from programs compiled here for 8 devices, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdist.telemetry.wire import axes_of, bytes_by_axis, collectives_of, total_bytes, wire_bytes

ROWS = 16  # elements that each device holds: 64 bytes in fp32
B = 4 * ROWS


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


def compiled_text(fn, mesh, dtype=jnp.float32):
    spec = P(("data", "tensor"))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    argument = jax.ShapeDtypeStruct((8 * ROWS,), dtype)
    return jax.jit(mapped).lower(argument).compile().as_text()


def scatter(x, axis):
    return jax.lax.psum_scatter(x, axis, tiled=True)


def exchange(x, axis):
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def gather(x, axis):
    return jax.lax.all_gather(x, axis, tiled=True)


def rotate(x, axis):
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


# Each row: the operation, HLO's name for it, bytes that one device with an operand of B sends among 2, 4, 8.
OPERATIONS = [
    pytest.param(jax.lax.psum, "all-reduce", {2: B, 4: 2 * B * 3 / 4, 8: 2 * B * 7 / 8}, id="psum"),
    pytest.param(gather, "all-gather", {2: B, 4: 3 * B, 8: 7 * B}, id="all_gather"),
    pytest.param(scatter, "reduce-scatter", {2: B / 2, 4: B * 3 / 4, 8: B * 7 / 8}, id="psum_scatter"),
    pytest.param(exchange, "all-to-all", {2: B / 2, 4: B * 3 / 4, 8: B * 7 / 8}, id="all_to_all"),
    pytest.param(rotate, "collective-permute", {2: B, 4: B, 8: B}, id="ppermute"),
]
SIZES = {"data": 2, "tensor": 4, "data+tensor": 8}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("operation", "op", "per_device"), OPERATIONS)
def test_a_collective_sends_what_its_formula_says_along_the_axis_it_names(mesh, operation, op, per_device, name):
    axis, size = tuple(name.split("+")), SIZES[name]
    found = collectives_of(compiled_text(lambda x: operation(x, axis), mesh), mesh)
    assert [(c.op, c.axis, c.dtype, c.operand_bytes) for c in found] == [(op, name, "f32", B)]
    assert wire_bytes(found[0]) == per_device[size]
    assert bytes_by_axis(found) == {name: 8 * per_device[size]}
    assert found[0].exact
    assert not found[0].in_loop


def test_a_collective_in_nested_scans_counts_once_for_every_turn(mesh):
    def inner(carry, _):
        return jax.lax.psum(carry, "tensor") * 0.5, None

    def outer(carry, _):
        carry = jax.lax.scan(inner, carry, None, length=3)[0]
        return jax.lax.psum(carry, "data") * 0.5, None

    text = compiled_text(lambda x: jax.lax.scan(outer, x, None, length=5)[0], mesh)
    found = collectives_of(text, mesh)
    assert sorted((c.axis, c.trip_count, c.in_loop, c.exact) for c in found) == [
        ("data", 5, True, True),
        ("tensor", 15, True, True),
    ]
    assert bytes_by_axis(found) == {"data": 5 * 8 * B, "tensor": 15 * 8 * B * 3 // 2}


def test_a_loop_of_unknown_length_is_counted_once_and_flagged(mesh):
    def grow(x):
        return jax.lax.while_loop(lambda c: c.sum() < 1e6, lambda c: c + jax.lax.psum(c, "tensor"), x)

    (found,) = collectives_of(compiled_text(grow, mesh), mesh)
    assert (found.trip_count, found.in_loop, found.exact) == (1, True, False)


def test_what_a_branch_sends_is_counted_as_taken_and_flagged(mesh):
    def maybe(x):
        every = jax.lax.psum(x.sum(), ("data", "tensor"))
        return jax.lax.cond(every > 0, lambda v: jax.lax.psum(v, "data"), jnp.sin, x)

    found = {c.axis: c for c in collectives_of(compiled_text(maybe, mesh), mesh)}
    assert found["data+tensor"].exact
    assert not found["data"].exact
    assert total_bytes(found["data"]) == 8 * B


def test_several_operands_in_one_collective_are_added_up(mesh):
    def both(x):
        return exchange(x.reshape(4, 4), "tensor").reshape(-1)

    # On CPU an all-to-all becomes one instruction with an operand for each peer.
    (found,) = collectives_of(compiled_text(both, mesh), mesh)
    assert found.operand_bytes == B


def test_a_chain_that_does_not_close_sends_from_all_but_its_last_device(mesh):
    def shift(x):
        return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 3)])

    (found,) = collectives_of(compiled_text(shift, mesh), mesh)
    assert bytes_by_axis([found]) == {"tensor": 2 * 3 * B}


def test_the_dtype_is_that_of_the_compiled_program(mesh):
    """XLA's CPU back end sends a bf16 sum as fp32; bit patterns go as they are."""
    text = compiled_text(lambda x: jax.lax.psum(x, "data"), mesh, jnp.bfloat16)
    (found,) = collectives_of(text, mesh)
    in_text = "f32" if "= f32[16]{0} all-reduce(" in text else "bf16"
    assert (found.dtype, found.operand_bytes) == (in_text, ROWS * {"f32": 4, "bf16": 2}[in_text])

    def as_bits(x):
        return gather(jax.lax.bitcast_convert_type(x, jnp.uint16), "data")

    (found,) = collectives_of(compiled_text(as_bits, mesh, jnp.bfloat16), mesh)
    assert (found.dtype, found.operand_bytes) == ("u16", 2 * ROWS)


def test_axes_are_told_by_position_in_the_mesh_not_by_device_number():
    shuffled = Mesh(np.array(jax.devices()[:8])[[3, 7, 0, 4, 1, 5, 2, 6]].reshape(4, 2), ("tensor", "data"))
    found = collectives_of(compiled_text(lambda x: jax.lax.psum(x, "data"), shuffled), shuffled)
    assert [c.axis for c in found] == ["data"]


def test_axes_follow_another_device_order_where_one_is_given(mesh):
    order = list(mesh.devices.T.flat)  # partitions 0 and 1 now lie along data
    groups = ((0, 1), (2, 3), (4, 5), (6, 7))
    assert axes_of(groups, mesh) == "tensor"
    assert axes_of(groups, mesh, order) == "data"


def test_collectives_that_the_partitioner_adds_are_found(mesh):
    """A plain jit of a product whose contracted axis is sharded needs an all-reduce over that axis."""
    row, column = NamedSharding(mesh, P(None, "tensor")), NamedSharding(mesh, P("tensor", None))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=row)
    w = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=column)
    whole = NamedSharding(mesh, P())
    text = jax.jit(lambda x, w: x @ w, out_shardings=whole).lower(x, w).compile().as_text()
    assert bytes_by_axis(collectives_of(text, mesh)) == {"tensor": 2 * (2 * 3) * 16 * 8 * 4}
