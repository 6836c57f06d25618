"""FedAvg in Flower's simulation by Ray, with clients in PyTorch: one of `peers.py`'s contenders, in Flower's own
environment.

    python peer_flower.py DATA ROUNDS WARM WEIGHTS

DATA: a directory of x.npy, y.npy, offsets.npy. Prints one line of JSON; leaves the model in WEIGHTS.
"""

import functools
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from setting import BATCH, CLIENTS, COHORT, FEATURES, HIDDEN, RATE


def perceptron() -> torch.nn.Module:
    layers = torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    return torch.nn.Sequential(*layers)


@functools.lru_cache
def load(directory: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Once in each of Ray's processes."""
    torch.set_num_threads(1)  # there is one process for each core
    x, y, offsets = (np.load(Path(directory) / f"{name}.npy") for name in ("x", "y", "offsets"))
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), offsets


def client_app(directory: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        x, y, offsets = load(directory)
        client = int(context.node_config["partition-id"])
        model = perceptron()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        order = offsets[client] + torch.randperm(offsets[client + 1] - offsets[client])
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(order)}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


class Timed(FedAvg):
    """`ends`: when each round was done, in seconds."""

    ends: list[float]

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        assert len(replies) == COHORT
        assert not any(reply.has_error() for reply in replies), replies
        out = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return out


def main() -> None:
    directory, rounds, warm, weights = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    logging.getLogger("flwr").setLevel(logging.ERROR)
    strategy = Timed(
        fraction_train=COHORT / CLIENTS,  # of those that are there, in the first round perhaps not all
        min_train_nodes=COHORT,
        min_available_nodes=CLIENTS,
        fraction_evaluate=0.0,
    )
    strategy.ends, begin, results = [], time.perf_counter(), []
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        initial = ArrayRecord(perceptron().state_dict())
        results.append(strategy.start(grid, initial, num_rounds=warm + rounds))

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(app, client_app(directory), CLIENTS, backend_config=backend)
    seconds = strategy.ends[-1] - strategy.ends[warm - 1]
    names = {"0.weight": "w1", "0.bias": "b1", "2.weight": "w2", "2.bias": "b2"}
    state = results[0].arrays.to_torch_state_dict()
    np.savez(weights, **{names[name]: value.numpy().T for name, value in state.items()})
    print(
        json.dumps(
            {
                "rounds_per_second": rounds / seconds,
                "seconds_before": strategy.ends[warm - 1] - begin,
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    import peer_flower  # Ray's processes find its functions by the module's name, which must not be __main__

    peer_flower.main()
