"""How long a message may be before any rule sees it: one message's own business, whatever is made of all."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.federated.privacy.clip import clip as shortened


def clip(message: Any, norm: jax.typing.ArrayLike, centre: Any = None) -> Any:
    """The message, brought to at most `norm` from `centre` by the shortest way: a tree of the same types.

        centre + (message - centre) min(1, norm / |message - centre|)

    The norm is L2, over all leaves, in float32. With last round's aggregate as the centre it is one step of centred
    clipping: Karimireddy, He & Jaggi 2021, arXiv 2012.10333. A message whose distance is not finite becomes the
    centre: nothing can be told from it.

    Args:
      centre: a tree like the message; None: zero.
    """
    if centre is None:
        centre = jax.tree.map(jnp.zeros_like, message)
    cut = shortened(jax.tree.map(lambda x, c: x.astype(jnp.float32) - c, message, centre), norm)
    return jax.tree.map(
        lambda x, c, difference: jnp.where(cut.was_clipped, (c + difference).astype(x.dtype), x),
        message,
        centre,
        cut.update,
    )
