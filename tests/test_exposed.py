"""Exposed communication: its measure against brute force, and traces of programs that are known to have it or not."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.profiler import ProfileData
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.sync.strategy import build as build_sync
from jaxdist.telemetry.exposed import Exposure, ExposureWindow, exposed, kinds_of, read_trace, steps_to_trace
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.telemetry.wire import collectives_of

CONFIG: dict[str, Any] = {
    "name": "digits",
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"steps": 10}, "global_batch_size": 16},
    "telemetry": {"progress": "none"},
}

intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (pair[0], sum(pair))))


@given(intervals, intervals)
def test_exposed_time_is_every_moment_with_communication_and_no_computation(communication, computation):
    def within(spans):
        return {moment for start, end in spans for moment in range(start, end)}

    assert exposed(communication, computation) == len(within(communication) - within(computation))


@given(st.integers(0, 50), st.none() | st.integers(1, 60), st.integers(0, 60), st.integers(0, 5))
def test_the_traced_steps_are_of_the_attempt_and_never_meet_another_trace(first, total, start, length):
    taken = range(start, start + length)
    steps = steps_to_trace(first, total, taken)
    assert len(steps) <= 2
    assert not set(steps) & set(taken)
    assert not (taken and steps and steps.start == taken.stop)  # that trace ends only before this very step
    if total is None:
        assert len(steps) == 2
    if steps:
        assert steps.start >= first
        assert total is None or steps.stop <= total
    elif not taken and total is not None:
        assert first >= total


def test_the_traced_steps_come_after_a_warm_up_where_the_run_is_long_enough():
    assert steps_to_trace(0, 100) == steps_to_trace(0, None) == range(3, 5)
    assert steps_to_trace(40, 100) == range(43, 45)
    assert steps_to_trace(0, 4) == range(2, 4)
    assert steps_to_trace(0, 1) == range(1)
    assert steps_to_trace(0, 100, range(4, 8)) == range(9, 11)
    assert steps_to_trace(0, 100, range(5, 8)) == range(3, 5)


# Programs of which it is known what devices do


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("data",))


def measured(body, mesh, *shape, steps=range(1, 3)):
    """What a window reports over a loop of four steps of the program."""
    spec = P("data")
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jnp.ones((8, *shape))
    compiled = step.lower(x).compile()
    x = jax.device_put(x, compiled.input_shardings[0][0])
    names = [collective.name for collective in collectives_of(compiled.as_text(), mesh)]
    reports: list[Exposure] = []
    stopwatch = Stopwatch()
    with ExposureWindow(steps, kinds_of(compiled.as_text(), names), 8, stopwatch, reports.append) as window:
        for index in range(4):
            window.at(index, x)
            x = compiled(x)
        window.close(x)
    assert len(reports) == 1
    assert stopwatch.seconds["profile"] > 0
    return reports[0]


def test_a_program_that_only_communicates_is_exposed_nearly_all_the_time(mesh):
    def body(x):
        for _ in range(20):
            x = jax.lax.psum(x, "data")
        return x

    report = measured(body, mesh, 1 << 16)
    assert report.steps == 2
    assert 0.5 < report.fraction <= 1


def test_communication_in_a_loop_counts_though_the_loop_lasts_as_long_as_it(mesh):
    def body(x):
        return jax.lax.fori_loop(0, 20, lambda _, x: jax.lax.psum(x, "data"), x)

    assert 0.5 < measured(body, mesh, 1 << 16).fraction <= 1


def test_a_program_that_only_computes_is_never_exposed(mesh):
    def body(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x[0])[None]

    assert measured(body, mesh, 64, 64).fraction == 0


def test_a_window_that_the_loop_leaves_early_reports_the_steps_it_had(mesh):
    report = measured(lambda x: jax.lax.psum(x, "data"), mesh, 1 << 10, steps=range(3, 5))
    assert report.steps == 1
    assert report.fraction > 0


def test_where_another_trace_is_open_nothing_is_measured_and_the_log_says_why(mesh, tmp_path, caplog):
    with jax.profiler.trace(tmp_path):
        report = measured(lambda x: jax.lax.psum(x, "data"), mesh, 1 << 10)
    assert report.fraction is None
    assert "profiling session" in caplog.text
    assert list(tmp_path.rglob("*.xplane.pb"))  # the other trace is whole


def test_a_run_that_fails_in_the_window_leaves_no_trace_open(tmp_path):
    window = ExposureWindow(range(2), {}, 1, Stopwatch(), lambda report: None)

    def fail_in_the_window():
        with window:
            window.at(0)
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_window()
    with jax.profiler.trace(tmp_path):  # raises if one is open
        pass


# What XLA:GPU writes, put down by hand: two streams, the batch's copy, and one line that only sums up

GPU_TRACE = """
planes { name: "/device:GPU:%d"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000 stats { metadata_id: 1 str_value: "loop_fusion" } }
    events { metadata_id: 1 offset_ps: 30000 duration_ps: 10000 stats { metadata_id: 1 str_value: "loop_fusion" } }
  }
  lines { name: "Stream #20(Compute)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 5000 duration_ps: 15000 }
    events { metadata_id: 4 offset_ps: 38000 duration_ps: 6000 stats { metadata_id: 1 str_value: "reduce-done" } }
  }
  lines { name: "Stream #17(MemcpyH2D)" timestamp_ns: 1000 events { metadata_id: 3 duration_ps: 60000 } }
  lines { name: "XLA Modules" timestamp_ns: 1000 events { metadata_id: 5 duration_ps: 60000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_fusion" } }
  event_metadata { key: 2 value { id: 2 name: "ncclDevKernel_AllReduce_Sum_f32_RING_LL" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyH2D" } }
  event_metadata { key: 4 value { id: 4 name: "one_shot_kernel" } }
  event_metadata { key: 5 value { id: 5 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""


def test_kernels_of_a_gpu_are_told_apart_by_instruction_or_by_the_name_of_nccl():
    text = "".join(GPU_TRACE % device for device in (0, 1))
    trace = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))
    devices = read_trace(trace, {"loop_fusion": "computation", "reduce-done": "communication"})
    assert sorted(devices) == [0, 1]
    for busy in devices.values():
        assert busy.computation == [(1000, 1010), (1030, 1040)]
        assert sorted(busy.communication) == [(1005, 1020), (1038, 1044)]
        assert exposed(busy.communication, busy.computation) == 14  # 1010 to 1020, 1040 to 1044


# What XLA:CPU writes of a product that thread 1 starts and thread 2 ends: thread 2 marks the end of it after the
# all-reduce that had waited for it. An earlier task of thread 2 has nothing to do with it.

CPU_TRACE = """
planes { name: "/host:CPU"
  lines { name: "tf_XLAPjRtCpuClient/1" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 }
    events { metadata_id: 3 offset_ps: 1000 duration_ps: 1000
      stats { metadata_id: 1 int64_value: 5 } stats { metadata_id: 2 uint64_value: 71 } }
    events { metadata_id: 2 offset_ps: 3000 }
  }
  lines { name: "tf_XLAEigen/2" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 2000 }
    events { metadata_id: 6 offset_ps: 3000 duration_ps: 2000
      stats { metadata_id: 1 int64_value: 6 } stats { metadata_id: 2 uint64_value: 72 } }
    events { metadata_id: 2 offset_ps: 6000 }
    events { metadata_id: 1 offset_ps: 7000 }
    events { metadata_id: 4 offset_ps: 20000 duration_ps: 30000
      stats { metadata_id: 1 int64_value: 5 } stats { metadata_id: 2 uint64_value: 73 } }
    events { metadata_id: 5 offset_ps: 51000 stats { metadata_id: 3 uint64_value: 71 } }
    events { metadata_id: 2 offset_ps: 52000 }
  }
  event_metadata { key: 1 value { id: 1 name: "ThreadpoolListener::StartRegion" } }
  event_metadata { key: 2 value { id: 2 name: "ThreadpoolListener::StopRegion" } }
  event_metadata { key: 3 value { id: 3 name: "dot.1" } }
  event_metadata { key: 4 value { id: 4 name: "psum.1" } }
  event_metadata { key: 5 value { id: 5 name: "end: dot.1" } }
  event_metadata { key: 6 value { id: 6 name: "add.1" } }
  stat_metadata { key: 1 value { id: 1 name: "device_ordinal" } }
  stat_metadata { key: 2 value { id: 2 name: "_p" } }
  stat_metadata { key: 3 value { id: 3 name: "_c" } }
}
"""


def test_an_operation_that_other_threads_end_lasts_until_what_waited_for_it_starts():
    trace = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(CPU_TRACE))
    devices = read_trace(trace, {"dot.1": "computation", "add.1": "computation", "psum.1": "communication"})
    assert devices[5].computation == [(1001, 1020)]
    assert devices[5].communication == [(1020, 1050)]
    assert devices[6].computation == [(1003, 1005)]


def test_a_trace_without_devices_is_said_to_show_none():
    with pytest.raises(ValueError, match="no device, only /host:metadata"):
        read_trace(
            ProfileData.from_serialized_xspace(
                ProfileData.text_proto_to_serialized_xspace('planes { name: "/host:metadata" }')
            ),
            {},
        )


ASYNC = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(f32[8]{0} %p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %started = ((f32[8]{0}), f32[2]{0}) async-start(f32[8]{0} %x), calls=%wrapped
  %fusion = f32[8]{0} negate(f32[8]{0} %x)
  ROOT %finished = f32[2]{0} async-done(((f32[8]{0}), f32[2]{0}) %started)
}
"""


def test_both_halves_of_an_asynchronous_collective_are_communication():
    kinds = kinds_of(ASYNC, ["scatter"])
    assert {name for name, kind in kinds.items() if kind == "communication"} == {"scatter", "started", "finished"}
    assert kinds["fusion"] == "computation"


# In a run


def train(directory: Path, devices: int, *overrides: str) -> LoadedRun:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    topology = Topology(1, 0, jax.devices()[:devices])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    built = Built(config, topology, task, data, build_sync(config, topology, task, data))
    with StopFlag() as stop:
        return run(built, stop, Stopwatch())


def measurements(finished: LoadedRun) -> list[dict[str, Any]]:
    return [event for event in finished.events if event["kind"] == "exposed_communication"]


def test_a_run_on_several_devices_records_what_of_its_steps_was_exposed(tmp_path):
    finished = train(tmp_path / "run", 4)
    seconds = finished.summary["seconds"]
    (measured,) = measurements(finished)
    assert 0 < measured["fraction"] < 1
    assert measured["steps"] == 2
    assert seconds["exposed_communication"] == pytest.approx(measured["fraction"] * seconds["step"])
    assert seconds["profile"] > 0


def test_a_run_on_one_device_exposes_nothing_and_is_not_traced(tmp_path):
    finished = train(tmp_path / "run", 1)
    assert finished.summary["seconds"]["exposed_communication"] == 0
    assert finished.summary["seconds"]["profile"] == 0
    assert measurements(finished) == []


def test_it_can_be_switched_off(tmp_path):
    finished = train(tmp_path / "run", 4, "telemetry.exposed_communication=false")
    assert finished.summary["seconds"]["exposed_communication"] is None
    assert measurements(finished) == []


def test_the_profile_asked_for_and_the_measurement_are_both_taken(tmp_path):
    finished = train(tmp_path / "run", 2, "telemetry.profile={start: 4, steps: 2}")
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 1
    assert len(measurements(finished)) == 1


def test_steps_between_evaluations_are_measured_without_them(tmp_path):
    (measured,) = measurements(train(tmp_path / "run", 2, "train.eval_every=1"))
    assert measured["steps"] == 1
