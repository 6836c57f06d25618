"""`client_evaluation:` of a federated strategy: clients that never train, and models that are fine-tuned first."""

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from jaxdist.config.base import Block

Fraction = Annotated[float, Field(gt=0, lt=1)]


class FineTune(Block):
    """Each client trains the global model a little on its own data before it is evaluated."""

    steps: PositiveInt = Field(description="local steps, with the run's optimizer, which starts anew")
    learning_rate: PositiveFloat | None = Field(None, description="null: the clients' of the round before")


class ClientEvaluation(Block):
    """Of the clients' own validation samples, which data.partition.validation_fraction keeps."""

    held_out: PositiveInt | Fraction | None = Field(
        None, description="clients that never train and are evaluated apart: a number, or a fraction of all"
    )
    fine_tune: FineTune | None = Field(None, description="evaluate again after a few local steps of each client")


def num_held_out(block: ClientEvaluation | None, num_clients: int) -> int:
    """Of so many clients; at least 1 where a fraction is given."""
    given = None if block is None else block.held_out
    if given is None:
        return 0
    return given if isinstance(given, int) else max(1, round(given * num_clients))


def held_out_problems(held_out: int, *, num_clients: int, cohort_size: int | None) -> list[str]:
    """Where too few clients would be left to train; `cohort_size` None: all that are left."""
    left = num_clients - held_out
    if held_out and left < (cohort_size or 1):
        return [
            f"client_evaluation.held_out: {held_out} of {num_clients} clients leave {max(left, 0)} to train, and a "
            f"round needs {cohort_size or 1}; hold out fewer, or lower clients_per_round"
        ]
    return []


def client_evaluation_problems(config: Any) -> list[str]:
    """Where the rest of a config does not go with the block."""
    strategy, partition = config.strategy, getattr(config.data, "partition", None)
    if strategy.client_evaluation is None:
        return []
    problems = []
    keeps = getattr(partition, "validation_fraction", None) is not None
    if partition is not None and partition.manifest is None and not keeps:
        problems.append(
            "strategy.client_evaluation: clients keep no samples to be evaluated on; give "
            "data.partition.validation_fraction"
        )
    clients = getattr(partition, "clients", None)
    if clients is not None:
        held_out = num_held_out(strategy.client_evaluation, clients)
        found = held_out_problems(held_out, num_clients=clients, cohort_size=strategy.clients_per_round)
        problems += [f"strategy.{problem}" for problem in found]
    return problems
