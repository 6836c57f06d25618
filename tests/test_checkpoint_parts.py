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


def test_what_was_not_committed_is_not_believed_and_does_not_stay(checkpoints, tmp_path):
    write_part(tmp_path, 9, "shard-0", TREES[0])
    assert Checkpointer(tmp_path).newest().step == 7
    assert not (tmp_path / "step_00000007" / "given-up").exists()


def test_a_part_that_changed_on_the_disk_is_refused(checkpoints, tmp_path):
    victim = max(
        (tmp_path / "step_00000007" / "shard-1").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"shard-1.*hash"):
        Checkpointer(tmp_path).newest()
