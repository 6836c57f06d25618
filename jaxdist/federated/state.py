"""What the federated strategy carries from round to round."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FederatedState:
    """Everything that decides the next round: what a checkpoint holds."""

    step: jax.Array  # rounds so far, int32
    params: Any  # the global model; where a parameter is personal, its initial value
    model_state: Any
    server_state: Any  # the algorithm's
    outer_opt_state: Any
    last_mean: Any  # of the messages of the round before, where something looks at it; else ()
    client_state: Any  # see ClientState; leaves [clients, ...], sharded over the axis `clients`
    in_flight: Any = ()  # see asynchronous.in_flight; leaves [messages, ...], sharded likewise
    privacy: Any = ()  # the clip of the next round, float32, with central privacy
    residual: Any = ()  # what the codec of the parameters left out of all that were sent to clients


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientState:
    """What a client keeps between its rounds; in the state, of all of them."""

    algorithm: Any
    params: Any  # those that are personal
    model_state: Any
    memory: Any = ()  # of codecs and of what they left out
