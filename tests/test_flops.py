"""Operations counted from jaxprs, against products worked out by hand and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdist.telemetry.flops import Flops, count_flops, mfu, mfu_formula, training_flops
from jaxdist.telemetry.peak import peak_flops


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_batched_product_is_twice_batch_m_n_k():
    assert count_flops(lambda a, b: a @ b, array(3, 4, 5), array(3, 5, 6)) == Flops(matmul=2 * 3 * 4 * 6 * 5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_any_contraction_is_twice_the_product_of_its_index_sizes(sizes):
    b, c, i, j, k, l = sizes
    flops = count_flops(
        lambda x, y: jnp.einsum("bcikl,bcklj->bcij", x, y), array(b, c, i, k, l), array(b, c, k, l, j)
    )
    assert flops.total == 2 * b * c * i * j * k * l


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_reads_only_its_own_group_of_inputs(groups):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    flops = count_flops(conv, array(4, 16, 16, 8), array(3, 5, 8 // groups, 24))
    assert flops == Flops(convolution=2 * (4 * 8 * 8 * 24) * (3 * 5 * 8 // groups))


def test_a_convolution_counts_as_much_by_its_gradients():
    """The gradient by inputs dilates, the one by a grouped kernel splits the batch: the same products."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    x, kernel = array(4, 16, 16, 8), array(2, 2, 4, 24)
    forward = count_flops(conv, x, kernel).total
    by_kernel = count_flops(jax.grad(lambda k, x: conv(x, k).sum()), kernel, x).total - forward
    by_input = count_flops(jax.grad(lambda x, k: conv(x, k).sum()), x, kernel).total - forward
    assert by_input == forward
    assert by_kernel == forward


def test_a_scan_counts_its_body_once_for_every_turn():
    def deep(x, weights):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

    assert count_flops(deep, array(4, 8), array(7, 8, 8)).total == 7 * 2 * 4 * 8 * 8


def test_a_while_loop_counts_once_and_says_so():
    def loop(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)

    assert count_flops(loop, array(4, 4)) == Flops(2 * 64, 0, ("while loop of unknown length",))


def test_a_branch_counts_as_its_dearest():
    def either(p, x):
        return jax.lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert count_flops(either, jax.ShapeDtypeStruct((), bool), array(4, 4)).total == 2 * 2 * 64


def test_wrappers_change_nothing():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T,))

    @jax.custom_jvp
    def relu_square(x):
        return jax.nn.relu(x @ x)

    relu_square.defjvp(lambda p, t: (relu_square(*p), t[0]))
    for wrapped in (
        jax.jit(square),
        jax.checkpoint(square),
        relu_square,
        jax.jit(jax.checkpoint(jax.jit(square))),
    ):
        assert count_flops(wrapped, array(4, 4)).total == 2 * 64


@pytest.mark.parametrize("manual", [{"data", "tensor"}, {"data"}])
def test_a_sharded_program_counts_what_all_devices_do(manual):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    columns = P(None, "tensor") if "tensor" in manual else P()
    out = P("data", "tensor") if "tensor" in manual else P("data")

    def product(x, w):
        return x @ w

    sharded = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), columns), out_specs=out, axis_names=manual)
    assert count_flops(sharded, array(16, 32), array(32, 8)) == count_flops(product, array(16, 32), array(32, 8))


def test_experts_count_by_the_tokens_they_get():
    flops = count_flops(jax.lax.ragged_dot, array(40, 16), array(4, 16, 8), jax.ShapeDtypeStruct((4,), jnp.int32))
    assert flops.total == 2 * 40 * 16 * 8


def test_a_kernel_counts_once_for_every_point_of_its_grid():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    def call(x):
        return pl.pallas_call(kernel, grid=(3, 2), out_shape=array(8, 8))(x)

    assert count_flops(call, array(8, 8)).total == 6 * 2 * 8**3


def test_a_kernel_that_cannot_be_seen_into_is_named():
    def call(x):
        return jax.ffi.ffi_call("my_kernel", array(4, 4))(x @ x)

    assert count_flops(call, array(4, 4)) == Flops(2 * 64, 0, ("kernel my_kernel",))


def test_the_count_of_a_network_is_close_to_that_of_xla():
    """XLA also counts element-wise work, so it may be a little above, never below."""

    def network(x, w1, w2):
        return jax.nn.gelu(x @ w1) @ w2

    shapes = array(64, 128), array(128, 512), array(512, 128)
    ours = count_flops(network, *shapes).total
    cost = jax.jit(network).lower(*shapes).compile().cost_analysis()
    assert ours == 2 * 64 * 128 * 512 * 2
    assert ours <= cost["flops"] <= 1.1 * ours


def test_a_training_step_of_a_deep_network_is_three_forward_passes():
    def loss(weights, x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, weights)[0].sum()

    shapes = array(50, 8, 8), array(4, 8)
    forward = count_flops(loss, *shapes)
    # All but the first layer's gradient by its input, which JAX computes within the scan anyway.
    assert count_flops(jax.grad(loss), *shapes).total == training_flops(forward).total


def test_peaks_of_known_devices():
    # As jax names them; figures of the vendors' data sheets, half of those "with sparsity".
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 1979e12 / 2
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 1513e12 / 2
    assert peak_flops("NVIDIA H100 NVL", "bf16") == 1671e12 / 2
    assert peak_flops("NVIDIA H200", "tf32") == 989e12 / 2
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A100 80GB PCIe", "float32") == 19.5e12
    assert peak_flops("NVIDIA B200", "bf16") == 36000e12 / 8 / 2
    assert peak_flops("NVIDIA GB200", "bf16") == 10000e12 / 2 / 2
    assert peak_flops("NVIDIA L4", "bf16") == 242e12 / 2
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert [peak_flops(f"TPU {v}", "bf16") for v in ("v4", "v5 lite", "v5", "v5p", "v6 lite")] == [
        275e12,
        197e12,
        459e12,
        459e12,
        918e12,
    ]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "bf16"),
        ("NVIDIA L40", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("TPU v4", "fp32"),
    ],
)
def test_no_peak_is_guessed(kind, dtype):
    assert peak_flops(kind, dtype) is None


def test_the_bf16_peak_of_a_v100_is_unknown_as_it_has_no_bf16():
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None


def test_mfu_is_work_done_over_work_possible():
    assert mfu(3e12, seconds=0.5, devices=4, peak=5e12) == pytest.approx(0.3)
    line = mfu_formula(3e12, 0.5, 4, 5e12, device_kind="NVIDIA Q", dtype="bf16")
    assert line.startswith("MFU = 3e+12 FLOPs a step (3 x forward) / ")
    assert line.endswith("/ (0.5 s x 4 devices x 5e+12 bf16 FLOP/s of NVIDIA Q) = 30.00%")


def test_mfu_of_an_unknown_device_says_so():
    line = mfu_formula(3e12, 0.5, 4, None, device_kind="cpu", dtype="bf16")
    assert "unknown device 'cpu'" in line
    assert "%" not in line
