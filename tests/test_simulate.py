"""The virtual clock against closed forms, statistics, real compiled collectives and a measured network."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxdist
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.shipped import shipped_clusters, shipped_configs
from jaxdist.config.simulate import Simulate, bytes_per_second
from jaxdist.config.yaml_file import dump_yaml
from jaxdist.simulate.clock import VirtualClock
from jaxdist.simulate.cluster import Cluster, build_cluster
from jaxdist.simulate.collectives import collective_seconds
from jaxdist.telemetry.wire import Collective, collectives_of

MINIMAL = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "optimizer": {"kind": "sgd"}}
ALPHA, BANDWIDTH = 1e-3, 1e6  # between hosts: seconds, bytes per second
FAST_ALPHA, FAST = 1e-5, 1e8  # inside a host
BETWEEN = {"bandwidth": BANDWIDTH, "latency": ALPHA}
INSIDE = {"bandwidth": FAST, "latency": FAST_ALPHA}
FLOPS = 1e9


def cluster_of(*hosts: dict[str, Any], **rest: Any) -> Cluster:
    """With the links above, where there is something to link."""
    hosts = tuple({"flops": FLOPS, **host} for host in hosts)
    links = {}
    if any(host.get("devices", 1) > 1 for host in hosts):
        links["inside"] = INSIDE
    if sum(host.get("count", 1) for host in hosts) > 1:
        links["between"] = BETWEEN
    simulate = Simulate.model_validate({"hosts": list(hosts), **links, **rest})
    return build_cluster(simulate, simulate.num_devices)


def collective(op: str, size: int, *groups: tuple[int, ...], trips: int = 1) -> Collective:
    return Collective("c", op, "f32", size, groups, "data", trips, trips > 1, True)


def clock_of(cluster: Cluster, flops: float, *collectives: Collective, seed: int = 0) -> VirtualClock:
    clock = VirtualClock(cluster, seed)
    clock.run_program(0, flops, collectives)
    return clock


# What a step costs


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_step_of_equal_devices_is_its_share_of_the_operations_and_a_ring(n: int):
    size, flops = 1_000_000, 4e9
    clock = clock_of(cluster_of({"count": n}), flops, collective("all-reduce", size, tuple(range(n))))
    step = flops / n / FLOPS + 2 * (n - 1) / n * size / BANDWIDTH + 2 * (n - 1) * ALPHA
    assert [clock.seconds(s) for s in (0, 1, 10)] == pytest.approx([0, step, 10 * step])
    assert clock.columns(7)["virtual_compute_fraction"] == pytest.approx(flops / n / FLOPS / step)
    assert clock.columns(7)["virtual_wait_fraction"] == 0


N, B = 4, 600_000
CLOSED_FORMS = {  # (messages one after the other, bytes that one device sends)
    "all-reduce": (2 * (N - 1), 2 * (N - 1) / N * B),
    "all-gather": (N - 1, (N - 1) * B),
    "reduce-scatter": (N - 1, (N - 1) / N * B),
    "all-to-all": (N - 1, (N - 1) / N * B),
    "collective-broadcast": (1, (N - 1) * B),  # by the one that has it
}


@pytest.mark.parametrize("op", CLOSED_FORMS)
def test_a_collective_between_equal_hosts_takes_the_time_of_its_formula(op: str):
    messages, size = CLOSED_FORMS[op]
    seconds = collective_seconds(cluster_of({"count": N}), collective(op, B, tuple(range(N))))
    assert seconds == pytest.approx(messages * ALPHA + size / BANDWIDTH)


def test_a_permutation_is_one_message_of_each_device():
    ring = collective("collective-permute", B, (0, 1), (1, 2), (2, 3), (3, 0))
    assert collective_seconds(cluster_of({"count": 4}), ring) == pytest.approx(ALPHA + B / BANDWIDTH)


def test_a_collective_in_a_loop_is_paid_for_in_every_turn():
    cluster, flops = cluster_of({"count": 2}), 2.0
    once = clock_of(cluster, flops, collective("all-reduce", B, (0, 1))).seconds(1)
    five = clock_of(cluster, flops, collective("all-reduce", B, (0, 1), trips=5)).seconds(1)
    assert five - flops / 2 / FLOPS == pytest.approx(5 * (once - flops / 2 / FLOPS))


def test_one_device_at_a_quarter_of_the_speed_makes_all_wait_for_it():
    clock = clock_of(cluster_of({"count": 3}, {"flops": FLOPS / 4}), 4e9)
    assert clock.seconds(1) == pytest.approx(4.0)
    assert clock.columns(1)["virtual_compute_fraction"] == pytest.approx((3 * 1 + 4) / 4 / 4)
    assert clock.columns(1)["virtual_wait_fraction"] == pytest.approx(3 * (4 - 1) / 4 / 4)


def test_overlap_hides_its_part_of_the_communication_but_no_more_than_the_backward_pass_lasts():
    both = collective("all-reduce", 1_000_000, (0, 1))
    communication = 2 * ALPHA + 1.0
    for seconds, hidden in ((6.0, 0.5 * communication), (0.3, 2 / 3 * 0.3)):
        clock = clock_of(cluster_of({"count": 2}, overlap=0.5), 2 * seconds * FLOPS, both)
        assert clock.seconds(1) == pytest.approx(seconds + communication - hidden)


def test_another_program_costs_its_own_from_its_step_on():
    clock = clock_of(cluster_of({"count": 2}), 2e9)
    clock.run_program(3, 8e9, [collective("collective-permute", 1_000_000, (0, 1))])
    assert [clock.seconds(s) for s in (3, 4, 5)] == pytest.approx([3, 3 + 4 + 1 + ALPHA, 3 + 2 * (5 + ALPHA)])
    with pytest.raises(AssertionError, match="timed already"):
        clock.run_program(4, 1e9, [])


# Links


def test_a_group_within_a_host_uses_the_fast_link_and_one_across_hosts_the_slow_one():
    cluster = cluster_of({"count": 2, "devices": 2})
    inside = collective("all-reduce", B, (0, 1), (2, 3))
    assert collective_seconds(cluster, inside) == pytest.approx(2 * FAST_ALPHA + B / FAST)
    across = collective("all-reduce", B, (0, 2))
    assert collective_seconds(cluster, across) == pytest.approx(2 * ALPHA + B / BANDWIDTH)
    assert cluster.transfer_seconds(B, 0, 1) == pytest.approx(FAST_ALPHA + B / FAST)
    assert cluster.transfer_seconds(B, 1, 2) == pytest.approx(ALPHA + B / BANDWIDTH)
    assert cluster.transfer_seconds(B, 1, 1) == 0


def test_groups_that_leave_a_host_at_once_share_its_link():
    cluster = cluster_of({"count": 2, "devices": 2})
    both = collective("all-reduce", B, (0, 2), (1, 3))
    assert collective_seconds(cluster, both) == pytest.approx(2 * ALPHA + 2 * B / BANDWIDTH)


def test_a_link_carries_as_much_in_each_direction_at_once():
    cluster = cluster_of({"count": 2})
    assert cluster.exchange_seconds([(0, 1, B), (1, 0, B)]) == cluster.transfer_seconds(B, 0, 1)


@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)])
def test_a_ring_crosses_each_host_once_however_its_group_is_written(members: tuple[int, ...]):
    cluster = cluster_of({"count": 2, "devices": 4})
    seconds = collective_seconds(cluster, collective("all-reduce", B, members))
    assert seconds == pytest.approx(14 * (ALPHA + B / 8 / BANDWIDTH))


def test_the_host_with_the_slowest_link_sets_the_pace_of_a_ring():
    cluster = cluster_of({"count": 3}, {"bandwidth": BANDWIDTH / 10})
    seconds = collective_seconds(cluster, collective("all-gather", B, (0, 1, 2, 3)))
    assert seconds == pytest.approx(3 * (ALPHA + B / (BANDWIDTH / 10)))
    assert cluster.transfer_seconds(B, 0, 1) == pytest.approx(ALPHA + B / BANDWIDTH)
    assert cluster.transfer_seconds(B, 0, 3) == pytest.approx(ALPHA + 10 * B / BANDWIDTH)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**6)), min_size=1, max_size=20))
def test_messages_at_once_take_at_least_as_long_as_each_alone_and_at_most_as_long_as_one_after_the_other(flows):
    cluster = cluster_of({"count": 2, "devices": 2}, {"devices": 2, "bandwidth": BANDWIDTH / 3})
    alone = [cluster.transfer_seconds(size, source, target) for source, target, size in flows]
    together = cluster.exchange_seconds(flows)
    assert max(alone) * (1 - 1e-9) <= together <= sum(alone) * (1 + 1e-9)


# Chance


def expected_maximum(n: int, jitter: float) -> float:
    """Of n log-normal numbers of mean 1, by the integral of 1 - F(x)^n."""
    sigma = math.sqrt(math.log(1 + jitter**2))
    x = np.linspace(1e-6, 12, 200_001)
    cumulative = np.array([0.5 * math.erfc(-(math.log(v) + sigma**2 / 2) / sigma / math.sqrt(2)) for v in x])
    return float(np.trapezoid(1 - cumulative**n, x))


@pytest.mark.parametrize("n", [1, 2, 8])
def test_jitter_makes_a_step_as_long_as_the_expected_maximum_of_log_normal_times(n: int):
    steps, jitter = 4000, 0.3
    clock = clock_of(cluster_of({"count": n, "jitter": jitter}), n * FLOPS)
    each = np.diff([clock.seconds(s) for s in range(steps + 1)])
    error = each.std() / math.sqrt(steps)
    assert abs(each.mean() - expected_maximum(n, jitter)) < 4 * error
    if n == 1:
        assert each.mean() == pytest.approx(1, abs=4 * error)
        assert each.std() == pytest.approx(jitter, rel=0.1)
    compute = clock.columns(steps)["virtual_compute_fraction"] * clock.seconds(steps) / steps
    assert compute == pytest.approx(1, abs=4 * jitter / math.sqrt(n * steps))


@pytest.mark.parametrize("every", [4.0, 0.2])
def test_pauses_come_as_a_poisson_process_in_the_time_of_computing(every: float):
    steps, length = 20_000, 100.0
    clock = clock_of(cluster_of({"pauses": {"every_seconds": every, "seconds": length}}), FLOPS)
    pauses = (np.diff([clock.seconds(s) for s in range(steps + 1)]) - 1) / length
    counts = np.rint(pauses)
    assert pauses == pytest.approx(counts, abs=1e-6)
    mean = 1 / every
    assert abs(counts.mean() - mean) < 4 * math.sqrt(mean / steps)
    # Of a Poisson number the variance is the mean; that of its estimate is about (mean + 2 mean^2) / steps.
    assert abs(counts.var() - mean) < 4 * math.sqrt((mean + 2 * mean**2) / steps)
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 4 / math.sqrt(steps)  # no step draws another's numbers


def test_the_clock_is_a_function_of_seed_and_step_wherever_it_starts_and_whatever_was_asked_before():
    cluster = cluster_of(
        {"count": 2, "jitter": 0.2, "pauses": {"every_seconds": 5.0, "seconds": 3.0}}, {"jitter": 0.5}
    )
    all_reduce = collective("all-reduce", B, (0, 1, 2))
    whole = clock_of(cluster, 3e9, all_reduce)
    read = [whole.columns(s) for s in range(21)]
    assert clock_of(cluster, 3e9, all_reduce).columns(20) == read[20]
    assert whole.columns(5) == read[5]
    assert clock_of(cluster, 3e9, all_reduce, seed=1).seconds(20) != read[20]["virtual_seconds"]

    resumed = VirtualClock(cluster, seed=0, step=12, columns=read[12])
    resumed.run_program(12, 3e9, [all_reduce])
    for step in (12, 13, 20):
        assert resumed.columns(step) == pytest.approx(read[step], rel=1e-12)


def test_more_hosts_change_nothing_of_what_those_before_them_draw():
    few, more = (cluster_of({"count": n, "jitter": 0.2}) for n in (2, 5))
    of = [[c.compute_seconds(d, FLOPS, 3, seed=4) for d in range(2)] for c in (few, more)]
    assert of[0] == of[1]
    assert of[0][0] != of[0][1]


# Against what is real


def test_four_hosts_sum_as_fast_as_was_measured_on_four_network_namespaces():
    """A psum of 16 MB by Gloo, jax 0.10.2, links shaped to so many bit/s: 2.2 s, 0.21 s and 22 s."""
    for rate, measured in (("100 Mbit/s", 2.2), ("1 Gbit/s", 0.21), ("10 Mbit/s", 22.0)):
        cluster = cluster_of({"count": 4}, between={"bandwidth": rate, "latency": 5e-4})
        modelled = collective_seconds(cluster, collective("all-reduce", 16 * 2**20, (0, 1, 2, 3)))
        assert modelled == pytest.approx(measured, rel=0.15)


def compiled_collectives() -> list[Collective]:
    """Three sums over `tensor` in a loop, then one over `data`, of 4 kB a device."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))

    def step(x):
        x = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "tensor") * 0.5, None), x, None, length=3)[0]
        return jax.lax.psum(x, "data")

    spec = P(("data", "tensor"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * 1000,), np.float32)).compile()
    return collectives_of(compiled.as_text() or "", mesh)


@pytest.mark.parametrize(
    ("hosts", "tensor", "data"),
    [
        pytest.param(
            {"count": 2, "devices": 4},
            6 * (FAST_ALPHA + 1000 / FAST),  # within a host
            2 * (ALPHA + 4 * 2000 / BANDWIDTH),  # four pairs over one link
            id="tensor within hosts",
        ),
        pytest.param(
            {"count": 4, "devices": 2},
            6 * (ALPHA + 1000 / BANDWIDTH),  # each ring over two hosts, once in and once out
            2 * (ALPHA + 2 * 2000 / BANDWIDTH),
            id="tensor over two hosts",
        ),
        pytest.param({"count": 8}, 6 * (ALPHA + 1000 / BANDWIDTH), 2 * (ALPHA + 2000 / BANDWIDTH), id="one a host"),
    ],
)
def test_a_program_compiled_for_eight_devices_takes_what_its_mesh_and_the_hosts_say(hosts, tensor, data):
    found = compiled_collectives()
    assert sorted((c.axis, c.trip_count) for c in found) == [("data", 1), ("tensor", 3)]
    assert clock_of(cluster_of(hosts), 0.0, *found).seconds(1) == pytest.approx(3 * tensor + data)


# The config


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100 Mbit/s", 12.5e6), ("25 GB/s", 25e9), ("1.5kB/s", 1500), ("8 bit/s", 1), ("2 TB/s", 2e12), (7.0, 7.0)],
)
def test_a_bandwidth_is_bytes_per_second_or_says_its_unit(text: Any, rate: float):
    assert bytes_per_second(text) == rate


WRONG = {
    "hosts=[]": "simulate.hosts: list should have at least 1 item",
    "hosts=[{flops: 0}]": "simulate.hosts.0.flops: should be greater than 0",
    "hosts=[{flops: 1.0, flop: 2}]": "simulate.hosts.0.flop: unknown key (did you mean flops?)",
    "between.bandwidth=0": "simulate.between.bandwidth: should be greater than 0",
    "between.bandwidth=0 Mbit/s": "simulate.between.bandwidth: should be greater than 0",
    "between.bandwidth=100 Mb": "simulate.between.bandwidth: '100 Mb' is no rate",
    "between.latency=-1": "simulate.between.latency: should be greater than or equal to 0",
    "between=null": "between: is required, there are several hosts",
    "hosts=[{count: 2, devices: 2, flops: 1.0}]": "inside: is required, a host has several devices",
    "inside={bandwidth: 1.0}": "inside: has no effect, every host has one device",
    "hosts=[{flops: 1.0, bandwidth: 1.0}]": "hosts.0.bandwidth: has no effect, there is one host",
    "overlap=1.5": "simulate.overlap: should be less than or equal to 1",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_cluster_that_cannot_be_is_refused_with_what_is_wrong_and_where(override: str):
    config = {**MINIMAL, "simulate": {"hosts": [{"count": 2, "flops": 1.0}], "between": BETWEEN}}
    load(config)
    with pytest.raises(ConfigError) as caught:
        load(config, [f"simulate.{override}"])
    assert WRONG[override] in str(caught.value)


def test_a_cluster_needs_as_many_devices_as_the_mesh_has():
    simulate = Simulate.model_validate({"hosts": [{"count": 3, "flops": 1.0}], "between": BETWEEN})
    with pytest.raises(UserError, match=r"3 devices in all, but the mesh has 8.*JAX_NUM_CPU_DEVICES=3"):
        build_cluster(simulate, 8)


def test_a_cluster_may_be_a_file_or_a_shipped_one_and_is_recorded_in_full(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("hosts: [{count: 2, flops: 1.0e+9}]\nbetween: {bandwidth: 1 Gbit/s}\n")
    config = load(MINIMAL, [f"simulate={tmp_path}/mine.yaml"]).config
    assert config.simulate is not None
    assert config.simulate.between is not None
    assert (config.simulate.num_devices, config.simulate.between.bandwidth) == (2, 125e6)
    (tmp_path / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert load(tmp_path / "config.yaml").config == config

    (tmp_path / "broken.yaml").write_text("hosts: [{flops: 0}]\nbetwen: 1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: hosts.0.flops: .* greater than 0; betwen: unknown key"):
        load(MINIMAL, [f"simulate={tmp_path}/broken.yaml"])
    with pytest.raises(ConfigError, match="'nowhere' is no file and no shipped cluster"):
        load(MINIMAL, ["simulate=nowhere"])


@pytest.mark.parametrize("name", shipped_clusters())
def test_a_shipped_cluster_is_valid_and_no_config_of_a_run(name: str):
    simulate = load(MINIMAL, [f"simulate={name}"]).config.simulate
    assert simulate is not None
    assert clock_of(build_cluster(simulate, simulate.num_devices), 1e9).seconds(3) > 0
    assert not [config for config in shipped_configs() if name in config]


def test_a_run_has_one_virtual_clock_and_only_strategies_that_keep_it():
    real, simulated, other = (
        load(MINIMAL, o).config for o in ([], ["simulate=office_100mbit"], ["simulate=two_gpu_hosts"])
    )
    assert len({repr(c.identity()["simulate"]) for c in (real, simulated, other)}) == 3
    for override, problem in (
        ("run.elastic=shrink", "shrink cannot be simulated"),
        ("strategy={target: 'mine:Own'}", "simulate: has no effect on a strategy of your own"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load(MINIMAL, ["simulate=office_100mbit", override])


def simulated(directory: Path, *overrides: str) -> Any:
    config = {
        "name": "simulated",
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"kind": "digits"},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"budget": {"seconds": 1.0}, "global_batch_size": 64},
        "telemetry": {"progress": "none", "log_every": 1},
        "checkpoint": {"every": 5},
        "simulate": {
            "hosts": [{"count": 8, "flops": 1e7, "jitter": 0.3}],
            "between": {"bandwidth": "1 Gbit/s", "latency": 1e-3},
        },
        "run": {"dir": str(directory)},
    }
    return jaxdist.train(config, overrides)


def test_a_run_ends_when_the_virtual_seconds_are_spent_and_a_resumed_one_reads_the_same_clock(tmp_path: Path):
    whole = simulated(tmp_path / "whole")
    clock = whole.metrics["virtual_seconds"]
    assert clock[-2] < 1.0 <= clock[-1], "the first step that reaches them"
    assert np.all(np.diff(clock) > 0)
    assert whole.summary["status"] == "done"
    simulated(tmp_path / "again", "train.budget={seconds: 0.5}")
    resumed = simulated(tmp_path / "again")
    assert resumed.records[-1]["attempt"] == 2
    np.testing.assert_array_equal(resumed.metrics["virtual_seconds"], clock)
    for name in ("virtual_compute_fraction", "virtual_wait_fraction"):
        np.testing.assert_allclose(resumed.metrics[name], whole.metrics[name], rtol=1e-12)
    assert simulated(tmp_path / "again").records == resumed.records, "nothing is left to train"


def test_the_clock_counts_the_smaller_batches_of_a_warm_up_as_such(tmp_path: Path):
    warm = simulated(
        tmp_path / "warm",
        "train.batch_warmup={start: 16, steps: 4}",
        "simulate={hosts: [{count: 8, flops: 1.0e7}], between: {bandwidth: 1 GB/s, latency: 0.0}}",
        "train.budget={steps: 8}",
    )
    seconds = np.diff(warm.metrics["virtual_seconds"], prepend=0.0)
    assert warm.metrics["batch_size"].tolist() == [16, 16, 32, 32, 64, 64, 64, 64]
    np.testing.assert_allclose(seconds[4:] / seconds[0], 4.0, rtol=0.02)  # nearly all of it is computing
