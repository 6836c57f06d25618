"""What is shown: progress on the console, and the sinks."""

import importlib.util
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxdist.config.errors import UserError
from jaxdist.config.telemetry import Mlflow, Wandb
from jaxdist.telemetry import progress as progress_module
from jaxdist.telemetry.curve import Curve
from jaxdist.telemetry.progress import Progress
from jaxdist.telemetry.schema import byte_columns
from jaxdist.telemetry.sinks import open_sinks


def record(step, loss=2.0):
    always = {"schema": 1, "attempt": 1, "step": step, "samples": 32 * step, "seconds": step}
    return always | {"loss": loss, "tokens_per_second": 4096.0} | byte_columns({"data+fsdp": 4})


def evaluation(step, loss):
    return {"schema": 1, "attempt": 1, "step": step, "eval.loss": loss}


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_plain_progress_keeps_to_one_line_an_interval_with_the_first_and_the_last(clock):
    out = console()
    progress = Progress("auto", unit="tokens", every_seconds=10, console=out)
    progress.start("a run", 100)
    for step in range(1, 26):  # a step a second
        progress.update(record(step))
        clock[0] += 1
    progress.update(evaluation(25, 1.5))
    progress.stop()
    lines = out.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "a run",
        "step 1/100",
        "step 11/100",
        "step 21/100",
        "step 25/100",
    ]
    assert lines[-1] == "step 25/100, loss 2, validation loss 1.5 (step 25), 4.1k tokens/s, 1:15 left"


def test_a_last_record_that_was_printed_is_not_printed_again(clock):
    out = console()
    progress = Progress("plain", console=out)
    progress.start("a run", None)
    progress.update(record(1))
    progress.stop()
    assert out.file.getvalue().splitlines() == ["a run", "step 1, loss 2"]


def test_no_rank_but_the_first_shows_anything():
    for mode in ("auto", "plain", "panel", "none"):
        out = console(terminal=True)
        progress = Progress(mode, rank=1, console=out)
        progress.start("a run", 10)
        progress.update(record(1))
        progress.note("news")
        progress.stop()
        assert out.file.getvalue() == ""


def test_the_panel_shows_where_the_run_is_and_stays_when_it_ends(clock):
    out = console(terminal=True)
    progress = Progress("auto", unit="tokens", console=out)
    progress.start("a run", 100)
    for step in range(0, 101, 10):
        progress.update(record(step, loss=4.0 - step / 50))
        clock[0] += 5
    progress.update(evaluation(100, 2.125))
    progress.note("saved a checkpoint")
    progress.stop()
    screen = out.file.getvalue()
    last = screen[screen.rindex("╭") :]
    for shown in ("a run", "step 100/100", "loss 2,", "validation loss 2.125", "4.1k tokens/s", "0:55"):
        assert shown in last
    assert "saved a checkpoint" in screen
    curve = [line for line in last.splitlines() if any(0x2800 < ord(letter) <= 0x28FF for letter in line)]
    assert curve[0].split()[1] == "4"
    assert curve[-1].split()[1] == "2"


def test_a_panel_draws_no_more_often_than_twice_a_second():
    out = console(terminal=True)
    progress = Progress("panel", console=out)
    progress.start("a run", 10_000)
    for step in range(5_000):
        progress.update(record(step))
    progress.stop()
    assert out.file.getvalue().count("╭") <= 4


def test_a_falling_line_is_drawn_from_the_upper_left_to_the_lower_right():
    curve = Curve()
    for x in range(4):
        curve.add(x, -x)
    # A cell has 2 x 4 dots: columns 0 to 3, rows 0, 1, 2, 3, each joined to the row before by a stroke.
    (row,), low, high = curve.draw(2, 1, x_max=4)
    assert (low, high) == (-3, 0)
    assert row == chr(0x2800 + 0x01 + 0x08 + 0x10) + chr(0x2800 + 0x02 + 0x04 + 0x20 + 0x80)


@given(st.lists(st.floats(allow_nan=True), max_size=50), st.integers(1, 40), st.integers(1, 6))
def test_any_curve_fits_its_frame(values, width, height):
    curve = Curve()
    for x, y in enumerate(values):
        curve.add(x, y)
    drawing = curve.draw(width, height)
    assert (drawing is not None) == any(math.isfinite(y) for y in values)
    if drawing is not None:
        assert [len(row) for row in drawing.rows] == [width] * height
        assert any(letter != "\u2800" for row in drawing.rows for letter in row)


def test_a_long_curve_keeps_its_shape_in_bounded_memory():
    curve = Curve()
    for x in range(50_000):
        curve.add(x, math.cos(x / 50_000 * 2 * math.pi))
    assert len(curve._points) <= 1024
    (top, *_, bottom), low, high = curve.draw(40, 4)
    assert (low, high) == pytest.approx((-1, 1), abs=0.01)
    assert top[0] > "\u2800" < top[-1]
    assert bottom[20] > "\u2800"


def test_tensorboard_gets_every_number_by_step(tmp_path):
    (sink,) = open_sinks(tmp_path, "a run", {}, tensorboard=True)
    for step in (10, 20):
        sink.write(record(step, loss=step / 8) | {"program": "dense"})
    sink.write(evaluation(20, 1.5))
    sink.close()
    assert _tensorboard_scalars(tmp_path / "tensorboard")["loss"] == {10: 1.25, 20: 2.5}
    assert _tensorboard_scalars(tmp_path / "tensorboard")["eval/loss"] == {20: 1.5}
    assert _tensorboard_scalars(tmp_path / "tensorboard")["bytes/data_fsdp.sent"] == {10: 4.0, 20: 4.0}


def _tensorboard_scalars(directory):
    """Reads the event file by its own format: length, checksum, a protocol buffer, checksum."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in directory.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_only_what_is_asked_for_is_opened(tmp_path):
    assert open_sinks(tmp_path, "a run", {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_extra_is_named_with_the_way_to_get_it(tmp_path, extra, monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, extra, None)  # makes its import fail
    blocks = {"wandb": Wandb(project="p"), "mlflow": Mlflow(experiment="e")}
    with pytest.raises(UserError, match=rf"pip install 'jaxdist\[{extra}\]'"):
        open_sinks(tmp_path, "a run", {}, **{extra: blocks[extra]})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs jaxdist[wandb]")
def test_wandb_offline_keeps_its_run_with_ours(tmp_path):
    block = Wandb(project="p", mode="offline")
    for attempt in (1, 2):
        (sink,) = open_sinks(tmp_path, "a run", {"seed": 0}, wandb=block)
        sink.write(record(10 * attempt))
        sink.close()
    run_id = (tmp_path / "wandb_run_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs jaxdist[mlflow]")
def test_mlflow_gets_every_number_by_step_in_one_run_over_resumes(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    block = Mlflow(experiment="e", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    for step in (10, 20):
        (sink,) = open_sinks(tmp_path, "a run", {"seed": 0}, mlflow=block)
        sink.write(record(step, loss=step / 8))
        sink.close()
    client = mlflow.MlflowClient(block.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {10: 1.25, 20: 2.5}
    assert run.data.metrics["bytes.data_fsdp.sent"] == 4
    assert run.info.status == "FINISHED"


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs jaxdist[mlflow]")
def test_a_tracking_server_that_cannot_be_used_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"telemetry\.mlflow: cannot be opened"):
        open_sinks(tmp_path, "a run", {}, mlflow=Mlflow(experiment="e", tracking_uri="nowhere://x"))
