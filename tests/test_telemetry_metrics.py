"""metrics.jsonl: nothing complete is lost, nothing torn is read, and a resumed run reads as one."""

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.config.errors import UserError
from jaxdist.telemetry.jsonl import drop_torn_line, encode_line, read_jsonl
from jaxdist.telemetry.metrics_file import JsonlWriter, latest_attempts, read_metrics
from jaxdist.telemetry.schema import SCHEMA_VERSION, byte_columns, problems_of


def train(step, attempt=1, loss=1.0):
    record = {
        "schema": 1,
        "attempt": attempt,
        "step": step,
        "loss": loss,
        "samples": 8 * step,
        "seconds": step / 2,
    }
    return record | byte_columns({"data": 3 * step})


def evaluation(step, attempt=1, loss=1.0):
    return {"schema": 1, "attempt": attempt, "step": step, "eval.loss": loss}


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


numbers = st.one_of(st.integers(), st.floats(), st.booleans())
names = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: not name.startswith(("bytes", "eval.")))


@settings(max_examples=60, deadline=None)
@given(more=st.dictionaries(names, numbers, max_size=6), loss=st.floats(), step=st.integers(0, 2**60))
def test_any_record_comes_back_as_it_was_written(tmp_path_factory, more, loss, step):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    record = more | train(step, loss=loss)
    with JsonlWriter(path) as writer:
        writer.write(record)
    (read,) = read_metrics(path)
    assert read.keys() == record.keys()
    assert all(same(read[name], value) for name, value in record.items())


@given(st.recursive(st.floats() | numbers | st.text(), lambda inner: st.lists(inner) | st.dictionaries(names, inner)))
def test_lines_are_strict_json(value):
    line = encode_line({"value": value})
    json.loads(line, parse_constant=pytest.fail)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


def test_scalars_of_numpy_are_numbers():
    line = encode_line({"a": np.float32(0.5), "b": np.int64(3), "c": np.float32("nan"), "d": np.arange(2)})
    assert json.loads(line) == {"a": 0.5, "b": 3, "c": "NaN", "d": [0, 1]}


def test_a_write_does_not_wait_for_the_disk(tmp_path):
    records = [train(step) for step in range(1, 2001)]
    with JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        times = []
        for record in records:
            start = time.perf_counter()
            writer.write(record)
            times.append(time.perf_counter() - start)
    assert np.median(times) < 5e-6
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2000


def test_a_record_changed_after_it_was_written_is_written_as_it_was(tmp_path):
    record = train(1)
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write(record)
        record["loss"] = 99.0
    assert read_metrics(tmp_path / "m.jsonl")[0]["loss"] == 1.0


def test_records_are_on_the_file_within_a_second(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(train(1))
        deadline = time.monotonic() + 1.0
        while not path.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(read_metrics(path)) == 1


_WRITE_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from jaxdist.telemetry.metrics_file import JsonlWriter
writer = JsonlWriter(Path(sys.argv[1]))
step = 0
while True:
    writer.write({"schema": 1, "attempt": 1, "step": step, "loss": 1.0, "samples": step, "seconds": step / 8,
                  "bytes_sent": 0, "bytes_received": 0, "padding": "x" * 500})
    step += 1
    if step % 200 == 0:
        time.sleep(0.002)
"""


@pytest.mark.processes
def test_a_killed_run_leaves_every_complete_line_and_the_next_attempt_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", _WRITE_UNTIL_KILLED, str(path)])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    records = read_metrics(path)
    assert len(records) > 100
    assert [record["step"] for record in records] == list(range(len(records)))

    with JsonlWriter(path) as writer:
        writer.write(train(len(records), attempt=2))
    again = read_metrics(path)
    assert len(again) == len(records) + 1
    assert again[:-1] == records


@pytest.mark.parametrize("keep", range(0, 60, 7))
def test_a_torn_last_line_is_ignored_and_gone_once_the_file_is_opened_again(tmp_path, keep):
    path = tmp_path / "m.jsonl"
    whole = encode_line(train(1))
    torn = encode_line(train(2))[:keep]
    path.write_bytes(whole + torn)
    assert [record["step"] for record in read_metrics(path)] == [1]
    JsonlWriter(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("size", [10, 1 << 16, (1 << 16) + 1, 200_000])
def test_a_torn_line_of_any_length_is_dropped(tmp_path, size):
    path = tmp_path / "m.jsonl"
    for whole in (b"", b"{}\n"):
        path.write_bytes(whole + b"x" * size)
        drop_torn_line(path)
        assert path.read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_is_told_at_the_next_write_and_at_close(tmp_path):
    path = tmp_path / "m.jsonl"
    path.symlink_to("/dev/full")
    writer = JsonlWriter(path)
    writer.write(train(1))
    deadline = time.monotonic() + 5

    def write_until_told():
        while time.monotonic() < deadline:
            writer.write(train(2))
            time.sleep(0.02)

    with pytest.raises(OSError, match="No space left") as told:
        write_until_told()
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"m\.jsonl"):
        writer.close()


def test_steps_done_again_replace_those_of_earlier_attempts():
    first = [train(step, 1) for step in range(0, 100, 10)]
    second = [train(step, 2) for step in range(60, 140, 10)]
    third = [train(step, 3) for step in range(110, 150, 10)]
    got = [(record["attempt"], record["step"]) for record in latest_attempts(first + second + third)]
    assert got == [
        *((1, step) for step in range(0, 60, 10)),
        *((2, step) for step in range(60, 110, 10)),
        *((3, step) for step in range(110, 150, 10)),
    ]


def test_an_attempt_that_went_back_further_than_the_one_before_replaces_both():
    records = [train(10, 1), train(20, 1), train(30, 2), train(5, 3), train(8, 3)]
    assert [(r["attempt"], r["step"]) for r in latest_attempts(records)] == [(3, 5), (3, 8)]


def test_an_evaluation_repeated_at_the_resume_leaves_the_training_record_of_its_step():
    first = [train(100), evaluation(100, loss=2.0), train(110), evaluation(110)]
    second = [evaluation(100, 2, loss=3.0), train(120, 2)]
    assert latest_attempts(first + second) == [first[0], *second]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=5),
)
def test_a_resumed_run_reads_with_steps_that_only_grow_and_with_the_whole_last_attempt(attempts):
    records = [
        train(step, number)
        for number, (start, length) in enumerate(attempts, start=1)
        for step in range(start, start + length)
    ]
    read = latest_attempts(records)
    steps = [record["step"] for record in read]
    assert steps == sorted(set(steps))
    last = [record for record in records if record["attempt"] == len(attempts)]
    assert read[-len(last) :] == last
    # Each step is told by the last attempt that did it, unless a later one started before it.
    for record in read:
        later = [start for start, _ in attempts[record["attempt"] :]]
        assert all(record["step"] < start for start in later)


def test_another_schema_version_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(encode_line(train(1)) + encode_line(train(2) | {"schema": SCHEMA_VERSION + 1}))
    with pytest.raises(UserError, match=rf"m\.jsonl: line 2: schema version {SCHEMA_VERSION + 1}"):
        read_metrics(path)


def test_a_line_that_is_no_record_is_refused_by_its_number(tmp_path):
    path = tmp_path / "m.jsonl"
    for bad in (b"hello\n", b"[1]\n", b"\0\0\0\n"):
        path.write_bytes(encode_line(train(1)) + bad)
        with pytest.raises(UserError, match="line 2 is not a JSON object"):
            read_jsonl(path)


def test_bytes_by_axis_add_up_to_the_sums():
    assert byte_columns({"data": 3, "data+fsdp": 4}, {"up": 5}) == {
        "bytes.data.sent": 3,
        "bytes.data+fsdp.sent": 4,
        "bytes_sent": 7,
        "bytes.up.received": 5,
        "bytes_received": 5,
    }
    record = train(1)
    assert record["bytes_received"] == record["bytes.data.received"] == 3
    assert problems_of(record) == []
    assert problems_of(record | {"bytes.data.sent": 4}) == ["bytes_sent is 3, but its parts add up to 4"]


def test_the_schema_names_what_a_record_lacks():
    record = train(1)
    assert problems_of({k: v for k, v in record.items() if k not in ("loss", "samples")}) == [
        "no loss",
        "no samples",
    ]
    assert problems_of(evaluation(1)) == []
    assert problems_of(record | {"grad_norm": None}) == ["grad_norm is None, neither a number nor a text"]
