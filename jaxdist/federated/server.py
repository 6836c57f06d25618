"""What the server makes of a mean upload: the next global model. The same for rounds and for asynchronous clients."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist.federated import personal
from jaxdist.federated.algorithm import Round
from jaxdist.federated.client import Trainer
from jaxdist.federated.state import FederatedState


@dataclass(frozen=True)
class Server:
    """`outer_optimizer` takes the algorithm's outer gradient."""

    trainer: Trainer
    outer_optimizer: optax.GradientTransformation
    num_clients: int  # that may be sampled, N of the algorithms
    total_weight: float  # of these clients
    keeps_mean: bool = False  # the state holds the last mean message

    def step(
        self,
        state: FederatedState,
        mean: Any,
        cohort_size: jax.Array,
        weight: jax.Array,
        changes: jax.Array | bool = True,
    ) -> FederatedState:
        """The state after a mean upload {"message", "model_state": how it changed}; its client_state is as it was.

        `weight` is that of the cohort together. Where not `changes` (bool scalar), nothing does but the number of
        the step.
        """
        trainer = self.trainer
        params, model_state = trainer.shared(state.params), trainer.shared(state.model_state)
        round_ = Round(self.num_clients, cohort_size, weight / self.total_weight)
        outer, server_state = trainer.algorithm.server(params, mean["message"], state.server_state, round_)
        outer = jax.tree.map(lambda g, x: g.astype(x.dtype), outer, params)
        updates, opt_state = self.outer_optimizer.update(outer, state.outer_opt_state, params)
        new = dataclasses.replace(
            state,
            params=optax.apply_updates(params, updates),
            model_state=jax.tree.map(
                lambda x, change: (x + change).astype(x.dtype), model_state, mean["model_state"]
            ),
            server_state=server_state,
            outer_opt_state=opt_state,
            last_mean=jax.tree.map(lambda x, old: x.astype(old.dtype), mean["message"], state.last_mean)
            if self.keeps_mean
            else (),
        )
        old = dataclasses.replace(state, params=params, model_state=model_state)
        new = jax.tree.map(lambda a, b: jnp.where(changes, a, b), new, old)
        return dataclasses.replace(
            new,
            step=state.step + 1,
            params=personal.join(new.params, trainer.own(state.params)),
            model_state=personal.join(new.model_state, trainer.own(state.model_state)),
        )
