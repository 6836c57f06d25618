"""`data.partition` under strategies sync and parameter_server: who reads which client's samples."""

import jax
import numpy as np
import pytest

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.mesh import num_workers
from jaxdist.models.build import build_task
from jaxdist.parameter_server.build import build_plan
from jaxdist.runtime.topology import Topology
from jaxdist.sync.batches import Batches
from jaxdist.sync.strategy import build

CLIENTS = 4
SYNC = ["strategy.mesh={data: 2, fsdp: 2}", "train.global_batch_size=24", "train.accumulation_steps=2"]
SERVER = ["strategy={kind: parameter_server, workers: 3, worker_batch_size: 6}"]


def config(*overrides):
    return load(
        {
            "name": "clients",
            "model": {"kind": "mlp", "hidden": [8]},
            "data": {
                "kind": "synthetic_blobs",
                "samples": 400,
                "partition": {"clients": CLIENTS, "labels": {"kind": "dirichlet", "alpha": 0.3}},
            },
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            "train": {"budget": {"steps": 4}},
        },
        list(overrides),
    ).config


def built(*overrides):
    made = config(*overrides)
    data = build_data(made.data, made.seed)
    return made, data, build_task(made.model, data.info)


def test_each_worker_of_a_mesh_reads_one_client_alone_after_a_resume_too():
    made, data, task = built(*SYNC)
    strategy = build(made, Topology(1, 0, jax.devices()[:4]), task, data)
    assert num_workers(strategy.mesh) == CLIENTS
    read = {}
    for first in (0, 2):
        with Batches(strategy, first) as batches:
            read[first] = [batches.next()["sample_id"] for _ in range(first, 4)]
    for step in (2, 3):
        np.testing.assert_array_equal(read[0][step], read[2][step - 2])
    for batch in read[0]:
        for worker, device in enumerate(strategy.mesh.devices.ravel()):
            (own,) = [shard.data for shard in batch.addressable_shards if shard.device == device]
            assert own.shape == (2, 3)
            assert np.isin(own, data.partition.of(worker)).all()


def test_a_push_is_of_one_client_and_the_clients_take_turns():
    made, data, task = built(*SERVER, "strategy.local_steps=2")
    stream = build_plan(made, task, data).data.train
    for push in range(2 * CLIENTS):
        ids = stream.ids(np.arange(push * 12, (push + 1) * 12))
        assert np.isin(ids, data.partition.of(push % CLIENTS)).all()


def test_every_client_is_read_whole_before_any_of_its_samples_comes_again():
    made, data, task = built(*SERVER)
    stream = build_plan(made, task, data).data.train
    turns = max(data.partition.sizes) // 6 + 1
    ids = stream.ids(np.arange(turns * CLIENTS * 6)).reshape(turns, CLIENTS, 6)
    for client, size in enumerate(data.partition.sizes):
        own = ids[:, client].ravel()
        np.testing.assert_array_equal(np.sort(own[:size]), np.sort(data.partition.of(client)))


def test_as_many_clients_as_workers():
    made, data, task = built("strategy.mesh={data: 2}")
    with pytest.raises(UserError, match=r"4 clients for 2 workers.*data.partition=null"):
        build(made, Topology(1, 0, jax.devices()[:2]), task, data)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["run.elastic=shrink"], "run.elastic: shrink"),
        (["train.global_batch_size=64", "train.batch_warmup={start: 16, steps: 2}"], "train.batch_warmup"),
        ([*SERVER, "strategy.proportional_work=true"], "proportional_work"),
    ],
)
def test_what_would_mix_clients_is_refused(overrides, named):
    with pytest.raises(ConfigError, match=named):
        config(*overrides)
