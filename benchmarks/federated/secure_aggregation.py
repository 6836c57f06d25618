"""What a round of secure aggregation costs, in milliseconds of one processor core and octets on the wire.

    python benchmarks/federated/secure_aggregation.py

All clients run one after the other in this process. A tenth of them drop after they have sent their shares, the
dearest moment for the server. Prints a table in Markdown.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

import numpy as np

from jaxdist.config.privacy import SecureAggregation
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.client import Client
from jaxdist.federated.secure_aggregation.in_one_process import answer
from jaxdist.federated.secure_aggregation.masks import add_mask
from jaxdist.federated.secure_aggregation.server import Server
from jaxdist.transport.plain import to_plain


def one_round(num_clients: int, size: int) -> dict[str, float]:
    rules, quantiser = build_secure_aggregation(SecureAggregation(bits=16), num_clients, size)
    update = np.random.default_rng(0).normal(size=size).astype(np.float32)
    clients = {i: Client(rules, b"benchmark", i) for i in range(num_clients)}
    server = Server(rules, b"benchmark", clients.keys())
    dropped = set(range(num_clients // 10))
    of_client, of_server, sent = defaultdict(float), 0.0, defaultdict(int)
    started = time.process_time()
    vector = quantiser.encode(update)
    quantise = time.process_time() - started
    asked = dict.fromkeys(clients)
    while server.result is None:
        said = {}
        for one, message in asked.items():
            if not (server.phase == "vectors" and one in dropped):
                started = time.process_time()
                said[one] = answer(clients[one], message, vector)
                of_client[one] += time.process_time() - started
                arrays = getattr(said[one], "arrays", ())
                sent[one] += len(json.dumps(to_plain(said[one]))) + sum(array.nbytes for array in arrays)
        started = time.process_time()
        for one, message in said.items():
            assert server.receive(one, message)
        asked = server.advance()
        of_server += time.process_time() - started
    stayed = [one for one in clients if one not in dropped]
    assert quantiser.decode(server.result.total, len(stayed))[1] == len(stayed)
    return {
        "clients": num_clients,
        "parameters": size,
        "neighbours": rules.degree,
        "threshold": rules.threshold,
        "quantise": 1e3 * quantise,
        "client": 1e3 * statistics.median(of_client[one] for one in stayed),
        "server": 1e3 * of_server,
        "megabytes": statistics.median(sent[one] for one in stayed) / 1e6,
    }


def mask_milliseconds(size: int) -> float:
    """The least of 20."""
    words, taken = np.zeros(size, np.uint32), []
    for _ in range(20):
        started = time.process_time()
        add_mask(words, bytes(32))
        taken.append(time.process_time() - started)
    return 1e3 * min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--parameters", type=int, nargs="+", default=[100_000, 1_000_000])
    arguments = parser.parse_args()
    print(f"one mask of 1M uint32, drawn and added: {mask_milliseconds(1_000_000):.2f} ms\n")
    columns = ("clients", "parameters", "neighbours", "threshold", "quantise ms", "client ms", "server ms", "sent MB")
    print("|", " | ".join(columns), "|")
    print("|", "---|" * len(columns), sep="")
    for num_clients in arguments.clients:
        for size in arguments.parameters:
            row = one_round(num_clients, size)
            cells = (
                *(row[name] for name in ("clients", "parameters", "neighbours", "threshold")),
                *(f"{row[name]:.1f}" for name in ("quantise", "client", "server")),
                f"{row['megabytes']:.2f}",
            )
            print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
