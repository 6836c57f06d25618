"""What a federation over Flower can be asked for. Without Flower, and without jax."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.federated import Federated
from jaxdist.config.schema import Config
from jaxdist.config.silos import num_silos

CLIENT, CLIENTS = "partition-id", "num-partitions"  # of a SuperNode's --node-config, as Flower's own examples say


def check_installed() -> None:
    """Raises UserError where Flower is not."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("flwr is not installed: pip install 'jaxdist[flower]'")


def check_config(config: Config) -> None:
    """Raises ConfigError for what Flower cannot carry. What real silos cannot do, `strategy.silos` has refused."""
    strategy = config.strategy
    if not isinstance(strategy, Federated):
        raise ConfigError(["strategy.kind: Flower runs federations; use kind: federated"])
    silos, problems = strategy.silos, []
    if silos is None:
        problems.append(
            "strategy.silos: over Flower each client is a SuperNode, which alone reads its data; give silos: {}"
        )
    else:
        problems += [
            f"strategy.silos.{name}: has no effect over Flower, {instead}; leave it out"
            for name, instead in (
                ("lease", "whose SuperLink decides which SuperNodes are there"),
                ("transport", "whose SuperLink and SuperNodes have addresses and certificates of their own"),
            )
            if silos.changed(name)
        ]
    if strategy.secure_aggregation is not None:
        problems.append(
            "strategy.secure_aggregation: its clients answer the server in four phases of a round, and over Flower "
            "they answer once; use `jaxdist launch`, where silos do"
        )
    if problems:
        raise ConfigError(problems)


def check_loop(config: Config) -> None:
    """Raises ConfigError for what has no effect where Flower's own loop goes through the rounds."""
    given = {
        "train.stop_at": config.train.stop_at,
        "train.eval_every": config.train.eval_every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    problems = [
        f"{name}: has no effect in Flower's own loop, which records and saves what Flower does; leave it out, or use "
        "jaxdist.flower.server_app"
        for name, value in given.items()
        if value is not None
    ]
    if config.train.budget.rounds is None and config.train.budget.steps is None:
        problems.append("train.budget: Flower's own loop counts rounds; give rounds")
    if problems:
        raise ConfigError(problems)


def client_of(config: Config, node_config: Mapping[str, Any]) -> int:
    """Which client a SuperNode is. Raises UserError where it does not say so, or says what cannot be."""
    count = num_silos(config)
    assert count is not None, "see check_config"
    how = f"start it with --node-config '{CLIENT}=0 {CLIENTS}={count}', each with a number of its own"
    if CLIENT not in node_config:
        raise UserError(f"this SuperNode does not say which client it is; {how}")
    client = node_config[CLIENT]
    if type(client) is not int or not 0 <= client < count:
        raise UserError(f"{CLIENT}: {client!r}, and clients are numbered from 0 to {count - 1}; {how}")
    if node_config.get(CLIENTS, count) != count:
        raise UserError(
            f"{CLIENTS}: {node_config[CLIENTS]}, and data.partition.clients is {count}; start as many SuperNodes "
            "as there are clients"
        )
    return client
