"""The run directory, its summary, logs, profile and compile cache."""

import json
import logging
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.config.errors import UserError
from jaxdist.config.telemetry import Telemetry
from jaxdist.telemetry import summary
from jaxdist.telemetry.compile_cache import enable_compile_cache
from jaxdist.telemetry.logs import set_up_logging
from jaxdist.telemetry.metrics_file import JsonlWriter
from jaxdist.telemetry.profiling import ProfileWindow
from jaxdist.telemetry.run_directory import RunDirectory, load_run
from jaxdist.telemetry.schema import byte_columns


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text("name: quickstart\noptimizer: {learning_rate: 1e-3}\n")
    return run


def test_a_run_reads_back_as_arrays_of_equal_length(run):
    always = {"schema": 1, "attempt": 1, "samples": 1, "seconds": 1.0}
    with JsonlWriter(run.metrics) as writer:
        writer.write(always | {"step": 10, "loss": 2.5} | byte_columns({"data": 2**53 + 1}))
        more = {"grad_norm": 1.5, "program": "dense"}
        writer.write(always | {"step": 20, "loss": 2.0} | byte_columns({"data": 2**53 + 1}) | more)
        writer.write(always | {"step": 20, "eval.loss": 2.25})
    loaded = load_run(run.path)
    assert loaded.config == {"name": "quickstart", "optimizer": {"learning_rate": 0.001}}
    assert len(loaded.records) == 3
    np.testing.assert_array_equal(loaded.metrics["step"], [10, 20, 20])
    np.testing.assert_array_equal(loaded.metrics["loss"], [2.5, 2.0, np.nan])
    np.testing.assert_array_equal(loaded.metrics["eval.loss"], [np.nan, np.nan, 2.25])
    np.testing.assert_array_equal(loaded.metrics["grad_norm"], [np.nan, 1.5, np.nan])
    assert loaded.metrics["step"].dtype == np.int64
    assert loaded.records[0]["bytes_sent"] == 2**53 + 1
    assert "program" not in loaded.metrics
    assert loaded.records[1]["program"] == "dense"
    assert loaded.checkpoints_dir == run.path / "checkpoints"
    assert loaded.summary == {}


def test_an_event_is_on_the_file_when_the_call_returns(run):
    run.event("start", devices=8)
    run.event("checkpoint", step=100, seconds=float("nan"))
    start, checkpoint = load_run(run.path).events
    assert (start["kind"], start["attempt"], start["devices"]) == ("start", 1, 8)
    assert start["time"].endswith("+00:00")
    assert start["time"] <= checkpoint["time"]
    assert checkpoint["step"] == 100


def test_each_start_of_a_run_is_an_attempt_of_its_own(run):
    assert run.attempt == 1
    run.event("start")
    resumed = RunDirectory(run.path)
    assert resumed.attempt == 2
    resumed.event("resume")
    assert RunDirectory(run.path).attempt == 3


def test_a_torn_event_does_not_spoil_the_next_attempt(run):
    run.event("start")
    with run.events.open("ab") as file:
        file.write(b'{"kind": "che')
    resumed = RunDirectory(run.path)
    resumed.create()
    resumed.event("resume")
    assert [event["kind"] for event in load_run(run.path).events] == ["start", "resume"]


def test_a_summary_replaces_the_one_before_and_leaves_no_draft(run):
    run.write_summary({"status": "running", "long": "x" * 10_000})
    run.write_summary({"status": "done", "final": {"loss": float("inf")}, "steps": np.int64(7)})
    assert load_run(run.path).summary == {"status": "done", "final": {"loss": float("inf")}, "steps": 7}
    assert not list(run.path.glob(".summary*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "not a run directory"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("[1]")), "not a run's config"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("a: [")), "config.yaml"),
    ],
)
def test_what_is_not_a_run_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "other")
    with pytest.raises(UserError, match=message) as refused:
        load_run(tmp_path / "other")
    assert "other" in str(refused.value)


def test_a_file_in_the_place_of_a_run_directory_is_the_users_to_move(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"choose another run\.dir"):
        RunDirectory(tmp_path / "run").create()


def test_nested_buckets_share_out_the_time_without_counting_it_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(summary.time, "perf_counter", lambda: now[0])
    stopwatch = summary.Stopwatch()
    with stopwatch("step"):
        now[0] += 3
        with stopwatch("checkpoint"):
            now[0] += 2
        now[0] += 1
    now[0] += 100  # in no bucket
    with stopwatch("eval"):
        now[0] += 5
    stopwatch.add("profile", 0.5)
    charged = {bucket: seconds for bucket, seconds in stopwatch.seconds.items() if seconds}
    assert charged == {"step": 4, "profile": 0.5, "eval": 5, "checkpoint": 2}


def test_the_git_commit_of_a_directory_tells_whether_it_was_changed(tmp_path):
    assert summary.git_sha(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    assert summary.git_sha(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert summary.git_sha(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_peak_memory_is_never_below_what_is_held():
    held = np.ones(25_000_000)
    peak = summary.peak_memory(jax.devices())
    assert peak["bytes"] > held.nbytes
    if jax.devices()[0].platform == "cpu":
        assert peak["of"] == "process resident set"


def test_descriptions_are_json_and_name_what_ran():
    text = json.dumps([summary.versions(), summary.host_description(), summary.device_description(jax.devices())])
    assert jax.__version__ in text
    assert f'"count": {jax.device_count()}' in text


@pytest.fixture
def logging_as_before():
    root, ours = logging.getLogger(), logging.getLogger("jaxdist")
    before = root.handlers[:], root.level, ours.level
    yield
    for handler in [h for h in root.handlers if h not in before[0]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.mark.parametrize(("rank", "shown"), [(0, ["news", "alarm", "their alarm"]), (3, ["alarm", "their alarm"])])
def test_the_console_shows_news_of_rank_0_and_alarms_of_all(tmp_path, capsys, logging_as_before, rank, shown):
    logging.getLogger().addHandler(logging.StreamHandler())  # as importing Orbax does
    for _ in range(2):  # setting up twice must not print twice
        set_up_logging(f"rank-{rank}", tmp_path)
    ours, theirs = logging.getLogger("jaxdist.sync"), logging.getLogger("orbax")
    ours.debug("detail")
    ours.info("news")
    ours.warning("alarm")
    theirs.info("their news")
    theirs.warning("their alarm")
    console = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in console] == shown
    assert all(f"rank {rank} " in line for line in console)
    file = (tmp_path / f"rank-{rank}.log").read_text().splitlines()
    assert [line.partition(": ")[2] for line in file] == ["detail", "news", "alarm", "their alarm"]


def test_a_profile_window_traces_the_steps_it_names_and_no_others(tmp_path):
    add_one = jax.jit(lambda x: x + 1)
    x = add_one(jnp.zeros(4))
    seen = []
    with ProfileWindow(3, 2, tmp_path) as window:
        for step in range(8):
            window.at(step, wait_for=x)
            seen.append(window.running)
            x = add_one(x)
    assert [step for step, running in enumerate(seen) if running] == [3, 4]
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_run_that_ends_inside_the_window_still_has_its_trace(tmp_path):
    def broken_run():
        with ProfileWindow(0, 100, tmp_path) as window:
            window.at(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_run()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_empty_window_traces_nothing(tmp_path):
    with ProfileWindow(0, 0, tmp_path) as window:
        window.at(0)
        assert not window.running


def test_the_compile_cache_goes_where_it_is_told(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert enable_compile_cache(Telemetry().compile_cache) == tmp_path / "jaxdist" / "xla"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxdist" / "xla")
        assert enable_compile_cache(str(tmp_path / "mine")) == tmp_path / "mine"
        assert enable_compile_cache(None) is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_config_block_imports_no_jax():
    check = "import sys, jaxdist.config.telemetry; sys.exit('jax' in sys.modules)"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    assert time.monotonic() - started < 30
