"""Comparisons of a parameter server with synchronous training: what is started, on which clock, in which unit."""

import math
from pathlib import Path
from typing import Any

import pytest
from comparisons import comparison, jobs

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.train import StopAt
from jaxdist.study.child import command_of
from jaxdist.study.compare import compare, described
from jaxdist.study.extend import _reaches
from jaxdist.study.plan import samples_per_step, steps_for
from jaxdist.study.report.runs import reached, read_run

CLUSTER = {"hosts": [{"count": 4, "flops": 1e9}], "between": {"bandwidth": 1e9}}
SYNC = {"train.global_batch_size": 32}
SAMPLE_FLOPS = 3 * 2 * (64 * 16 + 16 * 10)  # forward, and twice as many backward; 64 pixels, 16 hidden, 10 classes


def server(kind: str = "async", workers: int = 4, **more: Any) -> dict[str, Any]:
    strategy = {"kind": "parameter_server", "workers": workers, "worker_batch_size": 8}
    return {"strategy": strategy | {"consistency": {"kind": kind}} | more}


def test_a_simulated_server_is_one_process_on_one_device_beside_as_many_emulated_ones(tmp_path: Path):
    found = jobs(tmp_path, common={"simulate": CLUSTER}, devices=2, variants={"sync": SYNC, "nodes": server()})
    assert {key: (job.processes, job.devices, job.has_nodes) for key, job in found.items()} == {
        "sync/seed-0": (None, 4, False),
        "nodes/seed-0": (None, 1, False),
    }


def test_a_server_that_is_not_simulated_is_launched_as_the_processes_that_its_strategy_names(tmp_path: Path):
    variants = {"sync": SYNC, "nodes": server(servers=2)}
    of = comparison(tmp_path, processes=2, devices=1, variants=variants, seeds=[0, 1, 2])
    found = {job.key: job for _, _, job in of.planner().runs()}
    job = found["nodes/seed-0"]
    assert (job.processes, job.has_nodes) == (None, True), "processes: 2 are those of sync"
    command = command_of(Path("x.yaml"), job.processes, job.devices, (), has_nodes=job.has_nodes)
    launched = command[command.index("launch") :]
    assert launched == ["launch", "--max-restarts", "0", "--devices-per-proc", "1", "--", "train", "x.yaml"]
    planned = {run.variant: run.processes for run in described(of, of.planner(), None).runs}
    assert planned == {"sync": 2, "nodes": 1 + 2 + 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"common": {"simulate": CLUSTER}, "variants": {"a": server(workers=3)}},
            "strategy.workers: 3 must be the 4",
        ),
        (
            {"variants": {"a": {"processes": 2, **server()}}},
            "processes: 2 has no effect with strategy parameter_serv",
        ),
        ({"variants": {"a": {"simulate": CLUSTER, **server()}, "b": server()}}, "a on a virtual clock (simulate), b"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        jobs(tmp_path, **changes)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("strategy", "samples"),
    [
        (server("async"), 8),
        (server("ssp"), 8),
        (server("bsp"), 4 * 8),
        (server("ksync"), 3 * 8),
        (server(consistency={"kind": "ksync", "k": 2}), 2 * 8),
        (server(consistency={"kind": "buffered", "pushes": 5}), 5 * 8),
        (server("bsp", local_steps=10), 10 * 4 * 8),
        (SYNC, 32),
    ],
)
def test_a_version_is_made_of_the_samples_of_its_pushes(tmp_path: Path, strategy: dict[str, Any], samples: int):
    (job,) = jobs(tmp_path, variants={"a": strategy}).values()
    assert samples_per_step(job.config) == samples
    assert steps_for(job.config, 1000) == math.ceil(1000 / samples)


def test_evaluations_are_compared_by_samples_of_versions(tmp_path: Path):
    def warned(every: int) -> list[str]:
        variants = {"sync": SYNC, "nodes": {**server("ksync"), "train.eval_every": every}}
        of = comparison(tmp_path, common={"train.eval_every": 12}, variants=variants, seeds=[0, 1, 2])
        return described(of, of.planner(), None).warnings

    assert warned(16) == [], "12 x 32 samples, as many as 16 x 3 x 8"
    assert ["(sync 384, nodes 288)" in warning for warning in warned(12)] == [True]


def test_a_budget_of_samples_may_grow_by_what_versions_take(tmp_path: Path):
    (job,) = jobs(tmp_path, variants={"a": server()}, budget={"samples": 800}).values()
    budget = job.config.train.budget
    assert _reaches(budget, budget, job.config, 100)
    assert not _reaches(budget, budget, job.config, 101)


def test_a_range_test_that_could_not_be_read_is_refused(tmp_path: Path):
    of = comparison(tmp_path, variants={"sync": SYNC, "nodes": server()})
    with pytest.raises(UserError, match="--lr-range: nodes: a parameter server records no learning rate"):
        compare(of, print, lr_range=True)


@pytest.mark.processes
def test_bulk_synchronous_nodes_and_a_mesh_reach_a_target_at_the_same_virtual_time(tmp_path: Path):
    """The same gradients on one cluster with links of no weight: the times are those of the slowest device."""
    slow = {"hosts": [{"flops": 1e4}, {"count": 3, "flops": 4e4}], "between": {"bandwidth": 1e12}}
    of = comparison(
        tmp_path,
        common={"simulate": slow, "telemetry.log_every": 10},
        budget={"samples": 320},
        target={"metric": "eval.loss", "value": 2.3},
        variants={"sync": SYNC, "nodes": server("bsp")},
    )
    lines: list[str] = []
    assert compare(of, lines.append, report=False) == 0
    mesh, nodes = (read_run(of.directory / name / "seed-0") for name in ("sync", "nodes"))
    assert mesh.column("eval.loss")[-1][1] == pytest.approx(nodes.column("eval.loss")[-1][1], rel=1e-5), lines
    times = [reached(run, StopAt(metric="eval.loss", value=2.3)).seconds for run in (mesh, nodes)]  # type: ignore[union-attr]
    assert times[0] <= times[1] <= times[0] + 2, "nodes report once a second"
    assert times[0] == pytest.approx(10 * SAMPLE_FLOPS * 8 / 1e4, rel=1e-3), "10 steps of the slow device's 8 samples"
