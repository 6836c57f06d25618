"""The HLO reader on forms that a CPU does not print: asynchronous, iota groups, packed types, tilings."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from jaxdist.telemetry.hlo import parse_hlo, replica_groups, size_of
from jaxdist.telemetry.wire import bytes_by_axis, collectives_of

# Written after what XLA prints for GPUs and TPUs, in the grammar of its HLO printer.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[1024])) -> (s32[], bf16[1024]) {
  %state = (s32[], bf16[1024]{0:T(1024)(128)(2,1)}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %shard = bf16[1024]{0:T(1024)(128)(2,1)} get-tuple-element(%state), index=1
  %ag = (bf16[1024]{0:T(1024)(128)(2,1)S(1)}, bf16[4096]{0}) all-gather-start(%shard), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  %ag.done = bf16[4096]{0} all-gather-done(%ag)
  %rs = ((bf16[4096]{0}), bf16[1024]{0}) reduce-scatter-start(%ag.done), channel_id=4, replica_groups=[2,4]<=[8], use_global_device_ids=true, dimensions={0}, to_apply=%add
  %rs.done = bf16[1024]{0} reduce-scatter-done(%rs)
  ROOT %next = (s32[], bf16[1024]{0}) tuple(%count, %rs.done)
}

%condition (state.1: (s32[], bf16[1024])) -> pred[] {
  %state.1 = (s32[], bf16[1024]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%permuted (p: f32[32]) -> f32[32] {
  %p = f32[32]{0} parameter(0)
  ROOT %cp = f32[32]{0} collective-permute(%p), channel_id=9, source_target_pairs={{0,4},{4,0},{1,1}}
}

ENTRY %main (x: bf16[1024], y: f32[64], z: f32[32]) -> (bf16[1024], f32[64], /*index=2*/f32[32]) {
  %x = bf16[1024]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %z = f32[32]{0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1024]{0}) tuple(%zero, %x)
  %loop = (s32[], bf16[1024]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}
  %ar = (f32[64]{0}, f32[32]{0}) all-reduce-start(%y, %z), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add
  %ar.done = (f32[64]{0}, f32[32]{0}) all-reduce-done(%ar)
  %first = f32[32]{0} call(%z), to_apply=%permuted
  %second = f32[32]{0} async-start(%first), calls=%permuted
  %alone = f32[64]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %out = (bf16[1024]{0}, f32[64]{0}, f32[32]{0}) tuple(%x, %y, %second)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def test_asynchronous_collectives_count_once_by_their_start(mesh):
    found = collectives_of(ASYNCHRONOUS, mesh)
    assert [(c.name, c.op, c.axis, c.operand_bytes, c.trip_count) for c in found] == [
        ("ag", "all-gather", "fsdp", 2048, 12),
        ("rs", "reduce-scatter", "fsdp", 8192, 12),
        ("ar", "all-reduce", "data", (64 + 32) * 4, 1),
        ("cp", "collective-permute", "data", 128, 1),
        ("cp", "collective-permute", "data", 128, 1),
    ]
    assert bytes_by_axis(found) == {
        "fsdp": 12 * (8 * 3 * 2048 + 2 * 3 * 8192),
        "data": 4 * 2 * 1 * 384 + 2 * 2 * 128,  # four groups of two; two calls of two senders
    }


def test_iota_groups_are_what_numpy_makes_of_them():
    assert replica_groups("replica_groups=[2,4]<=[8], x=1", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert replica_groups("replica_groups=[4,2]<=[2,4]T(1,0)", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert replica_groups("replica_groups={{0,3},{1,2}}, a={{5,6}}", 4) == ((0, 3), (1, 2))
    assert replica_groups("replica_groups={}, channel_id=1", 3) == ((0, 1, 2),)


@given(st.permutations(range(3)), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_iota_groups_part_the_devices_for_every_transposition(order, count):
    dimensions = (2, 3, 4)
    text = f"replica_groups=[{count},{24 // count}]<=[2,3,4]T({','.join(map(str, order))})"
    groups = replica_groups(text, 24)
    assert sorted(device for group in groups for device in group) == list(range(24))
    # Along the flattened result, device ids step as a transposed array does in memory.
    expected = np.arange(24).reshape(dimensions).transpose(order).ravel()
    assert np.array_equal(np.concatenate([np.array(group) for group in groups]), expected)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['u'=1,'b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}", ((3, 2), (1, 0))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_groups_along_axes_of_a_mesh(text, groups):
    found = replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true", 8)
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


def test_an_unknown_form_of_groups_is_refused_by_name():
    with pytest.raises(ValueError, match="not known here: @here"):
        replica_groups("replica_groups=@here<a=2>", 8)


@pytest.mark.parametrize(
    ("text", "dtypes", "size"),
    [
        ("f32[]", ("f32",), 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", ("bf16",), 30),
        ("(f32[4]{0}, u8[3]{0})", ("f32", "u8"), 19),
        ("s4[10]{0:E(4)}", ("s4",), 5),
        ("u4[10]{0}", ("u4",), 10),
        ("f8e4m3fn[7]{0}", ("f8e4m3fn",), 7),
        ("c64[2]{0}", ("c64",), 16),
        ("pred[9]{0}", ("pred",), 9),
        ("f32[<=16]{0}", ("f32",), 64),
        ("token[]", (), 0),
    ],
)
def test_sizes_of_types(text, dtypes, size):
    assert size_of(text) == (dtypes, size)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("loss: 2.1")
