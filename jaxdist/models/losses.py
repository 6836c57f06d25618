"""Losses as (sum, weight, metric sums). B samples, V classes."""

import jax
import jax.numpy as jnp


def cross_entropy_terms(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in nats, [..., V] and [...] -> [...] float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def classification(
    logits_BxV: jax.Array, labels_B: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats a sample, and accuracy."""
    correct_B = (jnp.argmax(logits_BxV, -1) == labels_B).astype(jnp.float32)
    loss_sum = jnp.sum(weight_B * cross_entropy_terms(logits_BxV, labels_B))
    return loss_sum, jnp.sum(weight_B), {"accuracy": jnp.sum(weight_B * correct_B)}


def squared_error(
    outputs: jax.Array, targets: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Squared error summed over a sample's outputs; [B, ...] or [B] each."""
    difference = outputs.astype(jnp.float32).reshape(len(weight_B), -1) - targets.reshape(len(weight_B), -1)
    return jnp.sum(weight_B[:, None] * difference**2), jnp.sum(weight_B), {}
