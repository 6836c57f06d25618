"""A multi-layer perceptron with ReLU. B samples."""

import jax
from flax import nnx

from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float
from jaxdist.models.linear import linear


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
