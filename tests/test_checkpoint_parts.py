"""A checkpoint whose parts are written by independent processes."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdist.checkpoint import Checkpointer, CheckpointFailed, part, read, write_part
from jaxdist.config.errors import UserError
from jaxdist.runtime.processes import stand_alone

TREES = [
    {"params": {"a": np.arange(6.0, dtype=np.float32)}, "opt_state": [{"count": np.array(3, np.int32)}]},
    {"params": {"b": {"c": np.ones((2, 3), np.float32)}}, "opt_state": [{"count": np.array(3, np.int32)}]},
]
WHOLE = {"params": {**TREES[0]["params"], **TREES[1]["params"]}, "opt_state": [{"count": np.array(3, np.int32)}]}


@pytest.fixture
def checkpoints(tmp_path):
    parts = {f"shard-{i}": write_part(tmp_path, 7, f"shard-{i}", tree) for i, tree in enumerate(TREES)}
    write_part(tmp_path, 7, "given-up", TREES[0])
    checkpointer = Checkpointer(tmp_path)
    checkpointer.commit(7, parts, {"seconds": 1.5}, {"loss": 2.0})
    return checkpointer


def test_parts_written_apart_are_read_as_one(checkpoints, tmp_path):
    found = Checkpointer(tmp_path).newest()
    assert (found.step, found.meta) == (7, {"seconds": 1.5})
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, WHOLE), WHOLE)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path), WHOLE["params"])


def test_some_leaves_can_be_read_by_another_number_of_writers(checkpoints):
    wanted = {"params": {"b": {"c": np.zeros((2, 3), np.float32)}}}
    got = checkpoints.restore(7, wanted, some=True)
    np.testing.assert_array_equal(got["params"]["b"]["c"], 1.0)
    with pytest.raises(UserError, match="not in the checkpoint: params/d"):
        checkpoints.restore(7, {"params": {"d": np.zeros(2, np.float32)}}, some=True)


def test_what_was_not_committed_is_not_believed_and_goes_with_a_later_commit(checkpoints, tmp_path):
    write_part(tmp_path, 8, "shard-0", TREES[0])
    part = write_part(tmp_path, 9, "shard-0", TREES[0])
    assert Checkpointer(tmp_path).newest().step == 7
    assert (tmp_path / "step_00000007" / "given-up").exists(), "it may still be written, and then deleted under hand"
    checkpoints.commit(9, {"shard-0": part}, {}, {})
    assert {path.name for path in (tmp_path / "step_00000007").iterdir() if path.is_dir()} == {"shard-0", "shard-1"}
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00000007", "step_00000009"]


def test_a_commit_that_is_asked_for_again_changes_nothing(checkpoints, tmp_path):
    parts = checkpoints.manifest(7)["parts"]
    before = (tmp_path / "step_00000007" / "COMMIT").stat()
    Checkpointer(tmp_path).commit(7, parts, {"seconds": 9.0}, {})
    assert (tmp_path / "step_00000007" / "COMMIT").stat().st_ino == before.st_ino
    assert checkpoints.meta(7) == {"seconds": 1.5}


def test_early_checkpoints_stay_until_the_next_and_push_no_other_out(tmp_path):
    checkpointer, seen = Checkpointer(tmp_path, keep=2), []
    for step, early in [(4, True), (10, False), (14, True), (18, True), (20, False), (24, True), (30, False)]:
        checkpointer.commit(step, {"p": write_part(tmp_path, step, "p", TREES[0])}, {}, {}, early=early)
        seen.append(checkpointer.steps())
    assert seen == [[4], [10], [10, 14], [10, 18], [10, 20], [10, 20, 24], [20, 30]]


def damage(part):
    victim = max(part.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")


def test_a_part_that_changed_on_the_disk_is_refused(checkpoints, tmp_path):
    damage(tmp_path / "step_00000007" / "shard-1")
    with pytest.raises(UserError, match=r"shard-1.*hash"):
        Checkpointer(tmp_path).newest()


def test_who_wants_some_leaves_reads_and_checks_only_the_parts_that_hold_them(checkpoints, tmp_path):
    damage(tmp_path / "step_00000007" / "shard-1")
    reader = Checkpointer(tmp_path)
    got = reader.restore(7, {"params": {"a": TREES[0]["params"]["a"]}}, some=True)
    np.testing.assert_array_equal(got["params"]["a"], TREES[0]["params"]["a"])
    with pytest.raises(UserError, match=r"shard-1.*hash"):  # what was not checked is not taken for good
        reader.restore(7, WHOLE)
    with pytest.raises(UserError, match=r"shard-1.*hash"):
        Checkpointer(tmp_path).restore(7, {"params": {"b": TREES[1]["params"]["b"]}}, some=True)


def test_the_parts_of_another_role_are_not_read_in_place_of_one_s_own(tmp_path):
    first = Checkpointer(tmp_path, role="first")
    first.save(1, TREES[0], meta={})
    first.wait()
    with pytest.raises(UserError, match="of the role first, and 'second' is wanted"):
        Checkpointer(tmp_path, role="second").restore(1, TREES[0])


def test_a_leaf_that_is_not_the_same_in_all_parts_is_refused(tmp_path):
    other = {"params": {"d": np.ones(2)}, "opt_state": [{"count": np.array([3, 3], np.int32)}]}
    parts = {name: write_part(tmp_path, 1, name, tree) for name, tree in (("p", TREES[0]), ("q", other))}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.commit(1, parts, {}, {})
    with pytest.raises(UserError, match="opt_state/0/count of q has another shape"):
        checkpointer.restore(1, TREES[0], some=True)


def test_the_directory_of_a_step_is_on_the_disk_before_its_commit_is(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(Path(f"/proc/self/fd/{file}").readlink()), sync(file))
    )
    part = write_part(tmp_path, 7, "p", TREES[0])
    Checkpointer(tmp_path).commit(7, {"p": part}, {}, {})
    commit = next(i for i, path in enumerate(synced) if path.name == ".COMMIT.tmp")
    assert tmp_path in synced[:commit]


def test_one_that_stands_alone_in_a_job_writes_and_reads_its_own_and_orbax_is_left_as_it_was(tmp_path, monkeypatch):
    orbax_says = part.multihost.process_index
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda backend=None: 1)
    stand_alone(True)
    try:
        about = write_part(tmp_path, 7, "p", TREES[0])
        assert part.multihost.process_index is orbax_says
        checkpointer = Checkpointer(tmp_path)
        checkpointer.commit(7, {"p": about}, {}, {})
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(7, TREES[0]), TREES[0])
        with pytest.raises(CheckpointFailed):
            write_part(tmp_path, 8, "p", {"a": np.array([object()])})
        assert part.multihost.process_index is orbax_says
    finally:
        stand_alone(False)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"], "what failed leaves nothing"
