"""Transformer blocks with experts: what of their routing goes along a chain to the loss, and what stays in the state.

B samples, T tokens, D width, E experts, R blocks with experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.models.context import counted, places
from jaxdist.models.experts import Routed
from jaxdist.task import Batch

EVEN = 1e-6  # a load this close to the mean, as a share of it, is even: sums of other orders differ by less


@dataclass(frozen=True)
class ExpertShape:
    """Of the experts of a stack of blocks. Fields as in `model.experts`; width, renormalize and so on are settled."""

    count: int
    per_token: int
    width: int
    shared: int
    every: int
    capacity_factor: float | None
    renormalize: bool
    balance: Literal["auxiliary", "bias"] | None
    auxiliary_weight: float
    bias_rate: float
    z_weight: float


def settled(experts: Mapping[str, Any], mlp_width: int) -> ExpertShape:
    """From the fields of `model.experts`."""
    renormalize, width = experts["renormalize"], experts["width"]
    return ExpertShape(
        **{
            **experts,
            "width": width or mlp_width,
            "renormalize": experts["per_token"] > 1 if renormalize is None else renormalize,
        }
    )


class Group(nnx.Module):
    """`every` layers one after another, of which the last has experts: one block of the chain."""

    def __init__(self, dense: Any, routed: Any, every: int, *, rngs: nnx.Rngs):
        for i in range(every - 1):
            setattr(self, f"dense_{i}", dense(rngs))
        self.routed = routed(rngs)
        self.every = every

    @property
    def layers(self) -> list[Any]:
        return [*(getattr(self, f"dense_{i}") for i in range(self.every - 1)), self.routed]


def embedded(x_BxTxD: jax.Array, shape: ExpertShape, num_routed: int) -> dict[str, Any]:
    """Activations that enter the first block: sums over the tokens of each sample and over blocks, float32."""
    B = len(x_BxTxD)
    zeros = {"loss": (B,), "balance": (B,), "dropped": (B,), "load": (B, shape.count), "imbalance": (B, num_routed)}
    return {"x": x_BxTxD, "routing": {name: jnp.zeros(size, jnp.float32) for name, size in zeros.items()}}


def run_block(
    module: Any, shape: ExpertShape, state: Any, activations: Any, number: Any, batch: Batch, keys_B: Any
) -> tuple[Any, Any]:
    """(activations, new state) of one block of the chain; `module` is its one layer or Group."""
    x_BxTxD, sums = activations["x"], activations["routing"]
    layers = module.layers if isinstance(module, Group) else [module]
    T = x_BxTxD.shape[1]
    where, counted_BxT = places(batch, T), counted(batch, T)
    for i, dense in enumerate(layers[:-1]):
        x_BxTxD = dense(x_BxTxD, keys_B, number * len(layers) + i, where)
    bias_E = current_bias(state, shape.bias_rate) if shape.balance == "bias" else None
    last = number * len(layers) + len(layers) - 1
    x_BxTxD, routed = layers[-1].routed(x_BxTxD, keys_B, last, where, batch["weight"], counted_BxT, bias_E)
    new_state = state if bias_E is None else {"bias": bias_E, "load": routed.fraction_E}
    return {"x": x_BxTxD, "routing": _added(sums, routed, shape, number)}, new_state


def _added(sums: Any, routed: Routed, shape: ExpertShape, number: Any) -> dict[str, jax.Array]:
    loss_B = shape.z_weight * routed.z_B
    if shape.balance == "auxiliary":
        loss_B = loss_B + shape.auxiliary_weight * routed.balance_B
    this_R = jnp.arange(sums["imbalance"].shape[1]) == number
    added = {
        "loss": loss_B,
        "balance": jax.lax.stop_gradient(routed.balance_B),
        "dropped": routed.dropped_B,
        "load": routed.load_BxE,
        "imbalance": jnp.where(this_R, shape.count * routed.fraction_E.max() * routed.tokens_B[:, None], 0.0),
    }
    return {name: sums[name] + added[name] for name in sums}


def initial_state(shape: ExpertShape, num_routed: int, stacked: bool) -> dict[str, Any]:
    """Of the bias that balances, {} without: what it was in the last step, and the loads that it then gave."""
    if shape.balance != "bias":
        return {}

    def one() -> dict[str, jax.Array]:  # arrays of their own: a buffer that stood in it twice could not be donated
        return {"bias": jnp.zeros(shape.count), "load": jnp.full(shape.count, 1 / shape.count)}

    if stacked:
        return {"blocks": jax.tree.map(lambda x: jnp.tile(x, (num_routed, 1)), one())}
    return {"blocks": {str(i): one() for i in range(num_routed)}}


def current_bias(state: Any, rate: float) -> jax.Array:
    """`rate` up for an expert with less than its share of the last step's choices, down for one with more
    (arXiv 2408.15664, algorithm 1).

    The mean of what microbatches and workers return is all that a step keeps of model state; a sign is no mean. So
    each returns the bias it used and its load, and the next step takes the sign of the mean load.
    """
    short_E = 1 / len(state["load"]) - state["load"]
    even_E = jnp.abs(short_E) <= EVEN / len(state["load"])
    return state["bias"] + rate * jnp.where(even_E, 0.0, jnp.sign(short_E))


def with_routing(loss: Any, sums: Any, shape: ExpertShape, weight_B: jax.Array) -> Any:
    """(loss_sum, weight, metric sums) of a head, with the routing's: balance and loads are means over blocks."""
    loss_sum, weight, metrics = loss
    weight_B = weight_B.astype(jnp.float32)
    num_routed = sums["imbalance"].shape[1]
    own = {"experts.balance": weight_B @ sums["balance"] / num_routed}
    if shape.capacity_factor is not None:
        own["experts.dropped"] = weight_B @ sums["dropped"] / num_routed
    for name, parts, per in (("load", sums["load"], num_routed), ("imbalance", sums["imbalance"], 1)):
        own |= {f"experts.{name}.{i}": part / per for i, part in enumerate(weight_B @ parts)}
    return loss_sum + weight_B @ sums["loss"], weight, {**metrics, **own}
