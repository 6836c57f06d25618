"""Flower's apps for a federation: `server_app` for its SuperLink, `client_app` for each of its SuperNodes.

Both are made of one config with `strategy: {kind: federated, silos: {}}`. A SuperNode is the client whose number its
`--node-config` gives as `partition-id`. Needs the extra `jaxdist[flower]`.
"""

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.yaml_file import dump_yaml, parse_yaml
from jaxdist.federated.flower.rules import check_config, check_installed, check_loop, client_of
from jaxdist.federated.silos.roles import Place, identity

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from jaxdist.federated.flower.strategy import FederatedStrategy
    from jaxdist.federated.silos.training import Training
    from jaxdist.run import Built

OVERRIDES = "overrides"  # of Flower's run config: "a.b=value c.d=value"
NUM_KEPT = 8  # clients of one process, as in Flower's simulation, whose data and programs are kept


def client_app(config: str | Path | dict[str, Any] | Config) -> "ClientApp":
    """A ClientApp whose client trains as a silo does, with the same programs on its own data.

    Args: config: as jaxdist.train takes it; the run config's `overrides` are applied to it.
    Raises UserError where Flower is missing; for what it cannot carry, when the app is run.
    """
    check_installed()
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    from jaxdist.federated.flower import messages

    app = ClientApp()

    @app.query()
    def who(message: "Message", context: "Context") -> "Message":
        try:
            found = resolve(config, context.run_config)
            said = messages.Known(client_of(found, context.node_config), identity(found))
        except UserError as error:
            said = messages.Known(0, "", refused=str(error))
        return Message(messages.say(said), reply_to=message)

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        found = resolve(config, context.run_config)
        client, told = client_of(found, context.node_config), messages.instructed(message.content)
        if (told.identity, told.client) != (identity(found), client):
            raise UserError(f"client {client}: the server means client {told.client} of perhaps another config")
        training = _training(dump_yaml(found.model_dump(mode="json")), client)
        arrays = messages.from_records(message.content.get(messages.ARRAYS), training.specs)
        training.check(told.run, arrays)
        result = training(told.work(arrays))
        return Message(messages.trained(result.arrays), reply_to=message)

    return app


def server_app(config: str | Path | dict[str, Any] | Config) -> "ServerApp":
    """A ServerApp that is a whole run of this config: it samples, aggregates, evaluates, records in the run's
    directory, saves checkpoints and goes on from them.

    Args: config: as jaxdist.train takes it; the run config's `overrides` are applied to it.
    Raises UserError where Flower is missing; for what it cannot carry, when the app is run.
    """
    check_installed()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        serve(resolve(config, context.run_config), grid)

    return app


def strategy(config: str | Path | dict[str, Any] | Config, overrides: Sequence[str] = ()) -> "FederatedStrategy":
    """For a ServerApp of your own and Flower's loop: the algorithm, aggregator, cohorts and server optimizer of a
    config. Nothing is written but what Flower writes.

    Raises UserError where Flower is missing, and for what has no effect then.
    """
    check_installed()
    from jaxdist.federated.flower.strategy import FederatedStrategy
    from jaxdist.federated.silos.strategy import ServerStrategy
    from jaxdist.run import fresh_state

    found = load(config, list(overrides)).config
    check_config(found)
    check_loop(found)
    built = _build(found, Place("server", 0, "", None))
    assert isinstance(built.strategy, ServerStrategy)
    return FederatedStrategy(built.strategy, fresh_state(built, lambda kind, **fields: None))


def serve(config: Config, grid: "Grid") -> Any:
    """A run over a Flower grid: the LoadedRun. Raises as jaxdist.train does."""
    from jaxdist.federated.flower.serving import FlowerServer
    from jaxdist.federated.silos.strategy import ServerStrategy
    from jaxdist.run import run, watchdog
    from jaxdist.runtime.stop import StopFlag
    from jaxdist.telemetry.summary import Stopwatch

    check_config(config)
    stopwatch = Stopwatch()
    with StopFlag() as stop, watchdog(config, stopwatch):
        with stopwatch("init"):
            built = _build(config, Place("server", 0, "", None))
        assert isinstance(built.strategy, ServerStrategy)
        strategy = FlowerServer.over(grid, built.strategy)
        return run(dataclasses.replace(built, strategy=strategy), stop, stopwatch)


def resolve(config: str | Path | dict[str, Any] | Config, run_config: Any) -> Config:
    """With the overrides of Flower's run config. Raises UserError for what Flower cannot carry."""
    found = load(config, shlex.split(str(run_config.get(OVERRIDES, "")))).config
    check_config(found)
    return found


@functools.lru_cache(NUM_KEPT)
def _training(config: str, client: int) -> "Training":
    """Of a client; `config` in YAML. A SuperNode starts a process for each message, and of this nothing is kept but
    the compiled programs; in Flower's simulation processes go on."""
    from jaxdist.federated.silos.strategy import SiloStrategy
    from jaxdist.run import beginning

    built = _build(load(parse_yaml(config, "config")).config, Place("silo", client, "", None))
    assert isinstance(built.strategy, SiloStrategy)
    return built.strategy.training(lambda: beginning(built), lambda: None)


def _build(config: Config, place: Place) -> "Built":
    import jax

    from jaxdist.run import build
    from jaxdist.runtime.processes import stand_alone
    from jaxdist.runtime.topology import Topology
    from jaxdist.telemetry.compile_cache import enable_compile_cache

    stand_alone(True)  # whatever job this process may stand in
    enable_compile_cache(config.telemetry.compile_cache)
    return build(config, topology=Topology(1, 0, jax.devices()), place=place)
