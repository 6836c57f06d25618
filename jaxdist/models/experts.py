"""A mixture of experts in the place of an MLP, its experts split over the mesh axis `expert`.

B samples, T tokens, N = B T on this device, W devices along `expert`, E experts, e = E / W of them here, J experts of
a token, S slots, C slots of an expert, D width, F hidden features of an expert.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxdist.mesh import microbatch_axes, sum_over
from jaxdist.models import grouped, routing
from jaxdist.models.grouped import Kernels
from jaxdist.models.routing import Chosen
from jaxdist.telemetry.flops import counted

EXPERT_RULES = (
    (r"expert_(in|gate)/kernel$", ("expert", "fsdp", "tensor")),
    (r"expert_out/kernel$", ("expert", "tensor", "fsdp")),
)
STACKED = r"expert_\w+/kernel$"  # leaves with a dimension of experts before those of a matrix


class Choices(NamedTuple):
    per_token: int
    add_up: bool  # whether the weights of a token's experts add up to 1
    capacity_factor: float | None  # None: no choice is dropped


class Routed(NamedTuple):
    """What one layer tells of its routing. Sums are over the tokens of each sample that count, float32."""

    tokens_B: jax.Array  # how many
    balance_B: jax.Array  # the auxiliary loss, see `balance`
    z_B: jax.Array  # log(sum(exp(logits)))^2
    load_BxE: jax.Array  # choices, as shares of a token's
    dropped_B: jax.Array  # choices over capacity, as shares of a token's; of those that count as many as of all
    fraction_E: jax.Array  # of all choices of the global microbatch that are for each expert; not differentiated


class Kernel(nnx.Module):
    """One matrix of each expert [E, inputs, outputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int, init: Any, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)), kind="matrix")


class Experts(nnx.Module):
    """`count` MLPs, of which each token takes `per_token`.

    Args:
      width, hidden: D and F. swiglu: of the experts; without, gelu.
      add_up, capacity_factor: of Choices.
      init, init_out: of the matrices into the hidden features (the router's too), and out of them.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        count: int,
        per_token: int,
        *,
        swiglu: bool,
        add_up: bool,
        capacity_factor: float | None,
        init: Any,
        init_out: Any,
        rngs: nnx.Rngs,
    ):
        self.router = nnx.Linear(width, count, use_bias=False, kernel_init=init, rngs=rngs)
        self.expert_in = Kernel(count, width, hidden, init, rngs=rngs)
        if swiglu:
            self.expert_gate = Kernel(count, width, hidden, init, rngs=rngs)
        self.expert_out = Kernel(count, hidden, width, init_out, rngs=rngs)
        self.swiglu, self.choices = swiglu, Choices(per_token, add_up, capacity_factor)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        weight_B: jax.Array,
        bias_E: jax.Array | None = None,
        counted_BxT: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed]:
        """(outputs [B, T, D], what is to be known of the routing). `weight_B`: what each sample's tokens count;
        `counted_BxT`: which of them do, None for all.

        In a manual region the kernels are those of this device's experts, along `expert`. Where a mesh leaves
        `tensor` to XLA that axis is made manual too: each of its devices exchanges its part of the features D alone
        over `expert` (XLA would gather them first), and computes with its part of F.
        """
        gate = self.expert_gate.kernel[...] if self.swiglu else None
        kernels = Kernels(self.expert_in.kernel[...], self.expert_out.kernel[...], gate)
        device = functools.partial(_on_device, choices=self.choices)
        mesh, everywhere = jax.sharding.get_abstract_mesh(), PartitionSpec()
        if mesh.shape.get("tensor", 1) > 1 and mesh.axis_types[mesh.axis_names.index("tensor")] == AxisType.Auto:
            features = columns = PartitionSpec(None, None, "tensor")
            of_kernels: list[Any] = [columns, PartitionSpec(None, "tensor"), None if gate is None else columns]
            device = jax.shard_map(
                functools.partial(device, over_tensor=True),
                in_specs=(features, everywhere, Kernels(*of_kernels), everywhere, everywhere, everywhere),
                out_specs=(features, everywhere),
                axis_names={"tensor"},
                check_vma=False,
            )
        return device(x_BxTxD, self.router.kernel[...], kernels, weight_B, bias_E, counted_BxT)


def _on_device(
    x_BxTxD: jax.Array,
    router_DxE: jax.Array,
    kernels: Kernels,
    weight_B: jax.Array,
    bias_E: jax.Array | None,
    counted_BxT: jax.Array | None,
    *,
    choices: Choices,
    over_tensor: bool = False,
) -> tuple[jax.Array, Routed]:
    """`over_tensor`: D of the inputs and outputs and F of the kernels are this device's part of them."""
    (B, T, D), (J, add_up, factor) = x_BxTxD.shape, choices
    x_NxD, E = x_BxTxD.reshape(-1, D), router_DxE.shape[1]
    if over_tensor:
        router_DxE = jax.lax.dynamic_slice_in_dim(router_DxE, D * jax.lax.axis_index("tensor"), D)
    logits_NxE = jnp.dot(
        x_NxD.astype(jnp.float32), router_DxE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if over_tensor:
        logits_NxE = jax.lax.psum(logits_NxE, "tensor")
    chosen = routing.choose(logits_NxE, J, add_up, bias_E)
    capacity = None if factor is None else routing.capacity_of(factor, T, J, E)
    if capacity is None:
        y_NxD = _dropless(x_NxD, chosen, kernels, over_tensor)
    else:
        y_NxD = _within_capacity(x_NxD, chosen, kernels, B, capacity, over_tensor)
    return y_NxD.reshape(B, T, D), balance(logits_NxE, chosen, weight_B, capacity, counted_BxT)


def _within_capacity(
    x_NxD: jax.Array, chosen: Chosen, kernels: Kernels, B: int, capacity: int, over_tensor: bool
) -> jax.Array:
    """Every expert has as many slots, of which each device sends all: to the experts and back by all_to_all."""
    E, J = chosen.probabilities_NxE.shape[1], chosen.experts_NxJ.shape[1]
    exchanges = len(kernels.into) < E
    places = routing.within_capacity(chosen.experts_NxJ.reshape(B, -1), capacity, E)
    rows_ExCxD = routing.dispatched(x_NxD, places, J).reshape(E, B * capacity, -1)
    if exchanges:  # [E, C, D] -> [e, W C, D]
        rows_ExCxD = jax.lax.all_to_all(rows_ExCxD, "expert", split_axis=0, concat_axis=1, tiled=True)
    out_ExCxD = _computed(grouped.mlp_of_equal, chosen.experts_NxJ.size, kernels, over_tensor, rows_ExCxD)
    if exchanges:
        out_ExCxD = jax.lax.all_to_all(out_ExCxD, "expert", split_axis=1, concat_axis=0, tiled=True)
    return routing.combined(out_ExCxD.reshape(-1, x_NxD.shape[1]), places, chosen.gates_NxJ)


def _dropless(x_NxD: jax.Array, chosen: Chosen, kernels: Kernels, over_tensor: bool) -> jax.Array:
    """Every token goes to every device along `expert`, for its experts may be on any, and what these make of it is
    added up. Shapes are fixed before the routing is known: an all_to_all with room for the worst would carry as much.
    """
    experts_NxJ, gates_NxJ, here = chosen.experts_NxJ, chosen.gates_NxJ, len(kernels.into)
    E, exchanges = chosen.probabilities_NxE.shape[1], len(kernels.into) < chosen.probabilities_NxE.shape[1]
    if exchanges:  # N -> W N
        everyone = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
        x_NxD, experts_NxJ, gates_NxJ = everyone(x_NxD), everyone(experts_NxJ), everyone(gates_NxJ)
        own_NxJ = experts_NxJ - here * jax.lax.axis_index("expert")
        experts_NxJ = jnp.where((own_NxJ >= 0) & (own_NxJ < here), own_NxJ, here)
    N, J = experts_NxJ.shape
    tile = grouped.tile_rows(N * J, E)
    places, expert_of_tile, num_tiles = routing.in_tiles(experts_NxJ.reshape(-1), here, tile, N * min(J, here))
    mlp = functools.partial(grouped.mlp_of_tiles, expert_of_tile=expert_of_tile, num_tiles=num_tiles, tile=tile)
    rows_SxD = routing.dispatched(x_NxD, places, J)
    out_SxD = _computed(mlp, chosen.experts_NxJ.size, kernels, over_tensor, rows_SxD)
    out_NxD = routing.combined(out_SxD, places, gates_NxJ)
    return jax.lax.psum_scatter(out_NxD, "expert", scatter_dimension=0, tiled=True) if exchanges else out_NxD


def _computed(mlp: Any, num_choices: int, kernels: Kernels, over_tensor: bool, rows: jax.Array) -> jax.Array:
    """`mlp` of rows [..., D], as many operations as the choices take."""
    flops = 2 * num_choices * sum(math.prod(kernel.shape[1:]) for kernel in jax.tree.leaves(kernels))
    if over_tensor:
        rows = jax.lax.all_gather(rows, "tensor", axis=rows.ndim - 1, tiled=True)
    out = counted(flops, mlp)(rows, kernels)
    return jax.lax.psum_scatter(out, "tensor", scatter_dimension=out.ndim - 1, tiled=True) if over_tensor else out


def balance(
    logits_NxE: jax.Array,
    chosen: Chosen,
    weight_B: jax.Array,
    capacity: int | None = None,
    counted_BxT: jax.Array | None = None,
) -> Routed:
    """The auxiliary loss of Switch (Fedus et al. 2021, eq. 4-6) for J choices: E sum_e f_e P_e, 1 where load is even.

    f_e is the fraction of the choices of one global microbatch that are for expert e, P_e the mean probability of e
    over its tokens. The fractions, which have no gradient, are added up over all devices that share the microbatch
    (jaxdist.mesh.microbatch_axes); what is left is a sum over tokens, of which each device returns its own: with
    sample weights it adds up to the microbatch's weight times its loss, on every mesh.
    """
    B, E = len(weight_B), logits_NxE.shape[-1]
    T, J = len(logits_NxE) // B, chosen.experts_NxJ.shape[-1]
    counts_BxT = jnp.ones((B, T), jnp.float32) if counted_BxT is None else counted_BxT.astype(jnp.float32)
    tokens_B, choices_BxTxE = counts_BxT.sum(1), jax.nn.one_hot(chosen.experts_NxJ.reshape(B, T, J), E).sum(2)
    count_BxE = (choices_BxTxE * counts_BxT[..., None]).sum(1)
    weight_B, axes = weight_B.astype(jnp.float32), microbatch_axes()
    sums = jnp.append(weight_B @ count_BxE, weight_B @ tokens_B * J)
    sums = sum_over(sums, axes) if axes else sums
    fraction_E = jax.lax.stop_gradient(sums[:-1] / jnp.maximum(sums[-1], 1e-30))
    balance_N = E * (chosen.probabilities_NxE @ fraction_E)
    z_N = jnp.square(jax.nn.logsumexp(logits_NxE, axis=-1))
    over_BxE = jnp.zeros((B, E)) if capacity is None else jnp.maximum(choices_BxTxE.sum(1) - capacity, 0.0)

    def of_counted(x_N: jax.Array) -> jax.Array:
        return (x_N.reshape(B, T) * counts_BxT).sum(1)

    dropped_B = over_BxE.sum(1) / J * tokens_B / T
    return Routed(tokens_B, of_counted(balance_N), of_counted(z_N), count_BxE / J, dropped_B, fraction_E)
