"""A checkpoint whose parts are written by independent processes."""

import jax
import numpy as np
import pytest

from jaxdist.checkpoint import Checkpointer, read, write_part
from jaxdist.config.errors import UserError

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


def test_a_part_that_changed_on_the_disk_is_refused(checkpoints, tmp_path):
    victim = max(
        (tmp_path / "step_00000007" / "shard-1").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"shard-1.*hash"):
        Checkpointer(tmp_path).newest()
