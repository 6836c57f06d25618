"""What a parameter server's run says of itself: lines, checkpoints' meta, and when its policies end it."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_parameter_server_config import config

from jaxdist.checkpoint import Checkpointer, write_part
from jaxdist.config.errors import ConfigError
from jaxdist.parameter_server.disk import META, CheckpointDisk, OwnState, is_early
from jaxdist.parameter_server.histograms import added, count, mean, octave, quantile
from jaxdist.parameter_server.recording import Recording, nothing_left
from jaxdist.parameter_server.state import Member, Record, State
from jaxdist.parameter_server.traffic import Totals, Traffic, traffic_of
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.strategy import Runtime
from jaxdist.telemetry.metrics_file import latest_attempts
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint
from jaxdist.transport.plain import plain


def state_at(version: int, loss: float, active: bool = True, **more: Any) -> State:
    """Of one worker that has pushed once a version, each of 4 samples and of this mean loss."""
    state = State(version=version, **more)
    record = Record(
        applied=version,
        staleness={"1": version},
        ages={"1": version},
        age=2.0 * version,
        compute_seconds=3.0 * version,
        blocked_seconds=1.0 * version,
    )
    state.members["worker-0"] = Member(1, active, clock=version, granted=version, record=record)
    state.ledger.applied = 4 * version
    state.sums = {"loss": 4.0 * version * loss, "weight": 4.0 * version}
    return state


def report(state: State, epoch: int = 1, **more: Any) -> dict[str, Any]:
    """As the lead reports it."""
    member = state.members["worker-0"]
    return {
        "epoch": epoch,
        "version": state.version,
        "samples": state.ledger.applied,
        "samples_discarded": 0,
        "applied": member.record.applied,
        "discarded": dict(state.discarded),
        "duplicate": 0,
        "fenced": 0,
        "staleness": dict(member.record.staleness),
        "shards": dict(state.shards),
        "sums": dict(state.sums),
        "active": 1,
        "cut": state.cut,
        "kept": None,
        "workers": {"worker-0": {"active": True, "clock": member.clock, **plain(member.record)}},
        **more,
    }


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints")


def runtime_of(checkpointer: Checkpointer, events: list | None = None, **before: Any) -> Runtime:
    seen = [] if events is None else events
    return Runtime(
        checkpointer,
        Stopwatch(),
        StopFlag(),
        lambda kind, **fields: seen.append((kind, fields)),
        is_first=True,
        log_every=5,
        **before,
    )


def recording_of(runtime: Runtime, version: int = 0, **train: Any) -> Recording:
    of_config = config(train=train)
    return Recording(SimpleNamespace(plan=SimpleNamespace(config=of_config), metric_names=()), runtime, version)


def commit(checkpointer: Checkpointer, state: State) -> None:
    state.cutting, state.cut = None, state.version
    version = state.version
    part = write_part(checkpointer.directory, version, "p", {"params": {"a": np.ones(2, np.float32)}})
    checkpointer.commit(version, {"p": part}, {META: plain(state)}, {})


def test_the_first_line_after_a_resume_is_of_what_was_done_since(checkpointer):
    saved = state_at(10, loss=5.0)
    commit(checkpointer, saved)
    recording = recording_of(runtime_of(checkpointer), 10)
    now = state_at(16, loss=5.0, cut=10)
    now.sums["loss"] = saved.sums["loss"] + 6 * 4 * 2.0  # a loss of 2 since
    recording.hear(report(now))
    record = recording.record()
    assert record is not None
    assert (record["step"], record["loss"]) == (16, pytest.approx(2.0))
    assert record["blocked_fraction"] == pytest.approx(0.25)
    assert record["staleness.seconds"] == pytest.approx(2.0)


def test_an_age_is_counted_with_all_of_its_octave():
    assert [octave(age) for age in (0.0, 1e-9, 2.0**-10, 0.3, 0.5, 0.51, 1.0, 1.5, 2.0, 1000.0)] == [
        *(-10, -10, -10, -1, -1, 0, 0, 1, 1, 10)
    ]


@given(st.lists(st.integers(0, 300), min_size=1))
def test_histograms_have_the_mean_and_quantiles_of_what_they_count(values: list[int]):
    histograms: list[dict[str, int]] = [{}, {}]
    for i, value in enumerate(values):
        count(histograms[i % 2], value)
    found = added(histograms)
    assert [int(value) for value in found] == sorted(set(values))
    assert mean(found) == pytest.approx(np.mean(values))
    assert quantile(found, 0.99) == np.quantile(values, 0.99, method="inverted_cdf")


def test_after_all_servers_went_back_lines_are_of_the_history_that_counts(checkpointer):
    commit(checkpointer, state_at(10, loss=5.0))
    recording = recording_of(runtime_of(checkpointer))
    recording.hear(report(state_at(25, loss=5.0, cut=10)))
    assert recording.record()["step"] == 25
    again = state_at(15, loss=5.0, cut=10)
    again.sums["loss"] += 5 * 4 * 1.0  # of the five pushes since version 10: one more than at first
    recording.hear(report(again, epoch=2))
    record = recording.record()
    assert (record["step"], record["loss"]) == (15, pytest.approx(6.0))
    assert record["pushes.applied"] == 15
    assert "samples_per_second" not in record, "it is not known when they had gone back"


def test_nan_stops_the_run_but_not_one_that_an_earlier_attempt_had_seen(checkpointer):
    saved = state_at(10, loss=1.0, discarded={"nonfinite": 2})
    commit(checkpointer, saved)
    recording = recording_of(runtime_of(checkpointer), 10)
    recording.hear(report(state_at(12, loss=1.0, cut=10, discarded={"nonfinite": 2})))
    with pytest.raises(TrainingStopped, match="version 13: a worker's loss, gradient, metric or model state is NaN"):
        recording.hear(report(state_at(13, loss=1.0, cut=10, discarded={"nonfinite": 3})))


def test_nan_that_is_skipped_ends_the_run_when_nothing_else_comes(checkpointer):
    recording = recording_of(runtime_of(checkpointer), on_nonfinite="skip", max_skipped=3)
    for version, nonfinite in [(1, 0), (1, 2), (2, 4), (2, 6)]:
        recording.hear(report(state_at(version, loss=1.0, discarded={"nonfinite": nonfinite})))
    with pytest.raises(TrainingStopped, match="max_skipped"):
        recording.hear(report(state_at(2, loss=1.0, discarded={"nonfinite": 7})))


def test_a_run_whose_pushes_count_for_nothing_ends(checkpointer):
    recording = recording_of(runtime_of(checkpointer), on_nonfinite="skip", max_skipped=3)
    recording.hear(report(state_at(1, loss=1.0, discarded={"empty": 2})))
    with pytest.raises(TrainingStopped, match=r"3 pushes were NaN, infinite, or of weight 0 \(train.max_skipped"):
        recording.hear(report(state_at(1, loss=1.0, discarded={"empty": 5})))


@pytest.mark.parametrize("shared_memory", [True, False])
def test_bytes_are_counted_whichever_way_they_take(shared_memory: bool):
    array = np.zeros(1 << 18, np.float32)
    names, token = ("worker-0", "server-1"), Credentials(b"a token that nobody guesses")
    with ExitStack() as stack:
        worker, server = (stack.enter_context(Endpoint(n, token, shared_memory=shared_memory)) for n in names)
        worker.connect("server-1", server.address)
        worker.send("server-1", {}, [array])
        assert server.receive(20.0) is not None
        ends = (
            SimpleNamespace(machine=SimpleNamespace(name=name), endpoint=end, refused=0)
            for name, end in zip(names, (worker, server), strict=True)
        )
        sent, received = (traffic_of(end, "x") for end in ends)
    for counted in (sent.sent, received.received):
        assert array.nbytes < counted["worker-server"] < array.nbytes + 1000


def test_a_checkpoint_before_the_first_line_forgets_no_earlier_attempt(checkpointer):
    runtime = runtime_of(checkpointer, bytes_before={"worker-server": 100}, seconds_before=7.0)
    recording = recording_of(runtime, 10)
    recording.totals = Totals({"worker-server": 11, "coordinator": 5}, {"worker-server": 9}, 0.1, 0)
    meta, _ = recording.about(plain(state_at(13, loss=1.0)))
    assert meta == {
        "step": 13,
        "samples": 52,
        "seconds": 7.0,
        "ended": None,
        "bytes.worker-server.sent": 111,
        "bytes.coordinator.sent": 5,
        "bytes_sent": 116,
        "bytes.worker-server.received": 109,
        "bytes_received": 109,
    }


@pytest.mark.parametrize(
    ("ended", "code", "reason"),
    [
        (None, DONE, "budget"),
        (None, RESTARTABLE, "signal"),  # the coordinator was started again after the signal
        ("target", DONE, "target"),
        ("signal", RESTARTABLE, "signal"),
        ("signal", DONE, "budget"),  # it came when the last version was done
    ],
)
def test_why_a_run_ended_agrees_with_its_exit_code(checkpointer, ended, code, reason):
    events: list[Any] = []
    runtime = runtime_of(checkpointer, events)
    recording = recording_of(runtime)
    recording.ended = ended
    recording.finish(code)
    assert runtime.ended == reason
    assert events == [("end", {"step": 0, "reason": reason})]


@pytest.mark.parametrize(
    ("budget", "before", "why"),
    [
        ({"steps": 11}, {}, None),
        ({"steps": 10}, {}, "budget"),
        ({"samples": 41}, {}, None),
        ({"samples": 40}, {}, "budget"),
        ({"seconds": 8.0}, {"seconds_before": 7.0}, None),
        ({"seconds": 7.0}, {"seconds_before": 7.0}, "budget"),
        ({"steps": 11}, {"ended_before": "target"}, "target"),
        ({"steps": 11}, {"ended_before": "signal"}, None),
    ],
)
def test_a_run_that_had_ended_has_nothing_left_unless_its_budget_grew(checkpointer, budget, before, why):
    commit(checkpointer, state_at(10, loss=1.0))
    rules = SimpleNamespace(budget_versions=budget.get("steps"), budget_samples=budget.get("samples"))
    plan = SimpleNamespace(rules=rules, config=config(train={"budget": budget}))
    strategy = SimpleNamespace(plan=plan, place=SimpleNamespace(alone=False))
    assert nothing_left(strategy, runtime_of(checkpointer, **before), 10) == why


def test_checkpoints_between_those_that_were_asked_for_are_early_but_never_the_last():
    for version, cut, active, every, early in [
        (30, None, True, 50, True),
        (50, 30, True, 50, False),
        (80, 50, True, 50, True),
        (103, 80, True, 50, False),  # an early one was being saved at version 100
        (117, 103, False, 50, False),
        (30, None, True, None, True),
    ]:
        assert is_early(plain(state_at(version, 1.0, active, cut=cut)), every) == early, (version, cut, every)


def test_a_version_that_is_saved_twice_has_parts_of_different_names(checkpointer):
    class Store:
        def tree(self, captured: Any) -> Any:
            return {"params": {"a": captured}}

    disk = CheckpointDisk(checkpointer, "nonce")
    first, second = (disk.save(4, 0, Store(), np.full(2, value)) for value in (1.0, 2.0))
    disk.commit(4, [first], plain(state_at(4, 1.0)))
    assert first["part"] != second["part"]
    assert checkpointer.newest().step == 4
    like = {"params": {"a": np.zeros(2)}}
    np.testing.assert_array_equal(checkpointer.restore(4, like)["params"]["a"], 1.0)


def test_a_workers_own_state_is_written_as_it_was_when_its_checkpoint_was_begun(tmp_path):
    own, like = OwnState(tmp_path, "worker-0"), {"a": np.zeros(2)}
    assert not own.save(1, None)
    assert own.load(1, like) is None
    own.keep(4, {"a": np.full(2, 4.0)})
    assert own.load(4, like) is None, "it may never be committed"
    assert own.save(4, None)  # it is not there any more by now
    own.keep(6, None)
    assert own.save(8, {"a": np.full(2, 8.0)})  # of a checkpoint that nobody spoke of before
    assert {version: own.load(version, like)["a"][0] for version in (4, 8)} == {4: 4.0, 8: 8.0}


def test_traffic_outlives_the_coordinator_but_not_the_job(checkpointer):
    checkpointer.directory.mkdir()
    disk = CheckpointDisk(checkpointer, "nonce")
    assert disk.kept_traffic() is None
    traffic = [Traffic("a", {"worker-server": 3}, {"worker-server": 2}, 0.5, 1)]
    disk.keep_traffic({"worker-server": 100}, traffic)
    assert disk.kept_traffic() == ({"worker-server": 100}, traffic)
    disk.forget()
    assert disk.kept_traffic() is None


def test_no_best_checkpoint_is_kept_by_what_is_not_known_yet():
    with pytest.raises(ConfigError, match=r"keep_best\.metric: eval\.loss is not known"):
        config(checkpoint={"every": 10, "keep_best": {"metric": "eval.loss"}})
    config(checkpoint={"every": 10, "keep_best": {"metric": "loss"}})


def test_lines_of_a_history_that_was_given_up_are_not_read():
    def line(step: int, name: str = "loss") -> dict[str, Any]:
        return {"attempt": 1, "step": step, name: 1.0}

    old = [line(10), line(20), line(30), line(20, "eval.loss")]
    new = [line(20), line(30), line(20, "eval.loss"), line(40)]
    assert latest_attempts([*old, *new]) == [old[0], *new]
