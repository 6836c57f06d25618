"""A multi-layer perceptron with ReLU. B samples."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from jaxdist.chain import Apart, Chain
from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float
from jaxdist.models.linear import linear
from jaxdist.randomness import sample_keys
from jaxdist.task import Batch


class MLP(nnx.Module):
    """Inputs [B, ...], flattened, to outputs [B, outputs]."""

    sharding_rules = (  # pairs of matrices: columns over tensor, then rows
        (r"hidden/\d*[02468]/kernel$", ("fsdp", "tensor")),
        (r"hidden/\d*[02468]/bias$", ("tensor",)),
        (r"hidden/\d*[13579]/kernel$", ("tensor", "fsdp")),
    )

    def __init__(self, features: int, hidden: list[int], outputs: int, rate: float = 0.0, *, rngs: nnx.Rngs):
        widths = [features, *hidden]
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)])
        self.out = nnx.Linear(widths[-1], outputs, rngs=rngs)
        self.rate = rate

    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        x = to_float(x, self.out.kernel.dtype).reshape(x.shape[0], -1)
        for site, layer in enumerate(self.hidden):
            x = dropout(jax.nn.relu(linear(layer, x)), self.rate, keys_B, site)
        return self.out(x)


def mlp_apart(hidden: list[int], rate: float, loss: Callable[[jax.Array, Batch], Any]) -> Apart | None:
    """An MLP as a chain: its hidden layers but the first are blocks. None where these are of unequal width, or none.

    Args:
      loss: (outputs, batch) -> (loss_sum, weight, metric sums).
    """
    if len(hidden) < 2 or len(set(hidden)) > 1:
        return None

    def layer(own: Any, x: jax.Array, site: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        keys_B = sample_keys(key, batch["sample_id"]) if rate and key is not None else None
        return dropout(jax.nn.relu(linear(SimpleNamespace(**own), x)), rate, keys_B, site)

    def embed(rest: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        x = to_float(batch["x"], rest["out"]["kernel"].dtype).reshape(batch["x"].shape[0], -1)
        return layer(rest["hidden"][0], x, 0, batch, key)

    def block(own: Any, state: Any, x: Any, number: Any, batch: Batch, key: jax.Array | None) -> Any:
        return layer(own, x, number + 1, batch, key), state

    def head(rest: Any, x: jax.Array, batch: Batch) -> Any:
        return loss(linear(SimpleNamespace(**rest["out"]), x), batch)

    blocks = tuple(f"hidden/{i}" for i in range(1, len(hidden)))
    return Apart(Chain(len(blocks), embed, block, head), blocks)
