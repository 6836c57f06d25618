"""Bytes of clients' uploads and downloads: what the arrays are that travel."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.federated.engine import Engine


def upload_bytes(engine: Engine, upload: Any, round_: int) -> int:
    """Of one client in a round: payloads of codecs, and the arrays that are sent as they are; with secure aggregation
    the masked vector. `upload`: `engine.upload(state)`."""
    message, upload = upload["message"], {name: x for name, x in upload.items() if name != "message"}
    leaves, of = jax.tree.leaves(message), engine.transmit
    goes = of.goes(message, round_ % of.num_groups) if of is not None else (True,) * len(leaves)
    sent = [x for x, one in zip(leaves, goes, strict=True) if one]
    if engine.secure is not None:
        return engine.secure.num_bytes(sum(x.size for x in (*sent, *jax.tree.leaves(upload))))
    if engine.parcels is not None:
        return engine.parcels.of_round(round_).payloads.num_bytes + num_bytes(upload)
    return num_bytes(sent) + num_bytes(upload)


def download_bytes(engine: Engine, state: Any) -> int:
    """Of one client in a round: parameters, shared statistics, what the algorithm broadcasts. `state`: as
    ShapeDtypeStructs."""
    params, *rest = engine.download(state)
    return (num_bytes(params) if engine.downlink is None else engine.downlink.payloads.num_bytes) + num_bytes(rest)


def num_bytes(tree: Any) -> int:
    """Of all arrays, or ShapeDtypeStructs."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
