"""`strategy: {kind: parameter_server}`: what it refuses, what it becomes, and which processes it needs."""

import re
import shlex

import pytest

from jaxdist.cli import main
from jaxdist.cli.launch_nodes import nodes_of_host
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.parameter_server.roles import RENDEZVOUS, find_place, of_host, roles

BASE = {
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
}


def config(strategy=None, **blocks):
    return load({**BASE, "strategy": {"kind": "parameter_server", **(strategy or {})}, **blocks}).config


@pytest.mark.parametrize(
    ("strategy", "blocks", "said"),
    [
        ({"consistency": {"kind": "bsp", "bound": 3}}, {}, "strategy.consistency.bound: unknown key"),
        ({"consistency": {"kind": "bsp", "max_delay": 3}}, {}, "strategy.consistency.max_delay: unknown key"),
        ({"consistency": {"kind": "ksync", "k": 5}, "workers": 4}, {}, "k (5) must be from 1 to the workers, 4"),
        ({"consistency": {"kind": "async", "max_delay": 2}, "workers": 8}, {}, "at least 7, workers - 1"),
        ({"consistency": {"kind": "async"}, "evict_after": 3.0}, {}, "evict_after has no effect in async"),
        ({"workers": 2, "evict_after": 3.0}, {}, "evict_after has no effect with 2 workers"),
        ({"consistency": {"kind": "async", "staleness_weight": {"power": 1.0}}}, {}, "power has no effect unless"),
        ({"durability": "memory", "replay_window": 3}, {}, "replay_window has no effect with durability: memory"),
        ({"cpu_workers": 3, "workers": 2}, {}, "cpu_workers (3) are some of the workers (2)"),
        ({"transport": {"host": "0.0.0.0"}}, {}, "give `certificates`"),
        ({"transport": {"insecure": True}}, {}, "insecure has no effect on loopback"),
        ({}, {"train": {"global_batch_size": 64}}, "use strategy.worker_batch_size"),
        ({}, {"train": {"on_spike": "skip"}}, "train.on_spike: has no effect"),
        ({}, {"train": {"budget": {"rounds": 3}}}, "train.budget.rounds"),
        ({"worker_batch_size": 30}, {"train": {"accumulation_steps": 4}}, "divide strategy.worker_batch_size (30)"),
        ({}, {"checkpoint": {"every_minutes": 3.0}}, "checkpoint.every_minutes"),
        ({}, {"gradient_compression": {"up": {"kind": "majority_vote"}}}, "majority_vote is made of all workers'"),
        ({}, {"gradient_compression": {"up": {"kind": "int8"}, "dense_steps": 5}}, "dense_steps: has no effect"),
        (
            {"servers": 2},
            {"optimizer": {"kind": "sgd", "learning_rate": 0.1, "clip_norm": 1.0}},
            "use servers: 1, or leave it out",
        ),
        (
            {"servers": 2, "workers": 2, "consistency": {"kind": "async", "staleness_weight": {}}},
            {"optimizer": {"kind": "sgd", "learning_rate": 0.1, "clip_norm": 1.0}},
            "norm of what staleness_weight makes of a push",
        ),
        ({"worker_batch_size": 1, "proportional_work": True}, {}, "proportional_work has no effect"),
    ],
)
def test_what_has_no_effect_or_makes_no_sense_is_refused(strategy, blocks, said):
    with pytest.raises(ConfigError) as refused:
        config(strategy, **blocks)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("optimizer", "given", "wanted"),
    [("sgd", "auto", 12), ("momentum", "auto", 8), ("sgd", "none", None), ("momentum", 9, 9)],
)
def test_the_delay_that_is_too_long_follows_from_workers_and_momentum(optimizer, given, wanted):
    strategy = {"workers": 8, "consistency": {"kind": "async", "max_delay": given}}
    found = config(strategy, optimizer={"kind": optimizer, "learning_rate": 0.1})
    assert found.strategy.max_delay(found.optimizer) == wanted


def test_ksync_waits_for_three_quarters():
    assert [ParameterServer(workers=n).k for n in (1, 2, 4, 5, 8)] == [1, 2, 3, 4, 6]


def test_a_run_stays_the_same_on_other_servers_but_not_with_other_workers():
    one = config({"servers": 1}).identity()
    assert one == config({"servers": 3, "durability": "backup", "transport": {"host": "127.0.0.2"}}).identity()
    assert one != config({"servers": 1, "workers": 3}).identity()


def test_a_job_of_processes_is_dealt_out_as_coordinator_servers_workers():
    strategy = ParameterServer(servers=2, workers=3, cpu_workers=1, durability="backup")
    places = [find_place({}, strategy, process, 8, "node1:1234") for process in range(8)]
    assert [place.name for place in places] == [
        "coordinator", "server-0", "server-1", "server-2", "server-3", "worker-0", "worker-1", "worker-2",
    ]  # fmt: skip
    assert {place.rendezvous for place in places} == {"node1:1234"}
    assert [(role.name, role.count, role.devices) for role in roles(strategy, 2)] == [
        ("coordinator", 1, 0), ("server", 4, 0), ("worker", 2, 2), ("worker", 1, 0),
    ]  # fmt: skip
    with pytest.raises(UserError, match="are 8 processes, the job has 3"):
        find_place({}, strategy, 0, 3, "node1:1234")


def test_a_launched_process_is_what_its_launcher_says_and_one_alone_is_the_whole_run():
    strategy = ParameterServer()
    launched = {RENDEZVOUS: "localhost:99", "JAXDIST_ROLE": "worker", "JAXDIST_ROLE_INDEX": "1"}
    assert find_place(launched, strategy, 0, 1, None).name == "worker-1"
    alone = find_place({}, strategy, 0, 1, None)
    assert alone.role == "coordinator"
    assert alone.rendezvous is None


def test_only_workers_that_are_not_for_the_processor_use_accelerators():
    strategy = ParameterServer(servers=2, workers=3, cpu_workers=1)
    places = [find_place({}, strategy, process, 6, "node1:1234") for process in range(6)]
    users = [place.name for place in places if place.uses_accelerators(strategy)]
    assert users == ["worker-0", "worker-1"]
    assert find_place({}, strategy, 0, 1, None).uses_accelerators(strategy)  # alone, it computes for all


@pytest.mark.parametrize(("servers", "workers", "hosts"), [(1, 2, 1), (2, 4, 2), (3, 5, 2), (2, 7, 3), (4, 4, 4)])
def test_hosts_share_the_nodes_out_and_no_host_has_both_copies_of_a_shard(servers: int, workers: int, hosts: int):
    strategy = ParameterServer(servers=servers, workers=workers, durability="backup")
    dealt = [of_host(roles(strategy), servers, host, hosts) for host in range(hosts)]
    every = sorted((role.name, index) for own in dealt for role, index in own)
    assert every == sorted((role.name, role.first + i) for role in roles(strategy) for i in range(role.count))
    assert "coordinator" in {role.name for role, _ in dealt[0]}
    for own in dealt:
        assert sum(role.name == "worker" for role, _ in own) in (workers // hosts, -(-workers // hosts))
        shards = [index % servers for role, index in own if role.name == "server"]
        assert hosts == 1 or len(set(shards)) == len(shards)


def test_a_launcher_on_each_host_starts_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in (("COORDINATOR", "node1:7777"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAXDIST_{name}", value)
    of_two = load("ps_async", ["strategy.transport={host: 0.0.0.0, insecure: true}", f"run.dir={tmp_path}"]).config
    with pytest.raises(UserError, match="JAXDIST_JOB_TOKEN: not set"):
        nodes_of_host(of_two, ["train", "ps_async"], None)
    monkeypatch.setenv("JAXDIST_JOB_TOKEN", "a secret of the job")
    nodes = nodes_of_host(of_two, ["train", "ps_async"], None)
    assert [node.name for node in nodes] == ["server 1", "worker 2"]
    assert {node.environment[RENDEZVOUS] for node in nodes} == {"node1:7777"}
    with pytest.raises(UserError, match=r"host: 127\.0\.0\.1 is not reached from the other 1 hosts"):
        nodes_of_host(load("ps_async", []).config, ["train", "ps_async"], None)


def test_a_cluster_s_script_starts_launchers_of_a_parameter_server(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "slurm", "--gpus-per-node", "0", "--render", "--", "train", "ps_async"]) == 0
    script = capsys.readouterr().out
    assert "set -- launch -- train ps_async" in script
    again = re.search(r"# {3}jaxdist (.*)", script)
    assert again is not None
    assert main(shlex.split(again[1])) == 0
    assert capsys.readouterr().out == script
