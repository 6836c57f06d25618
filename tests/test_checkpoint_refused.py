"""A damaged checkpoint is refused, with what is wrong with which file, and the last good one is used."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.checkpoint import Checkpointer, manifest
from jaxdist.config.errors import UserError

ONE = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def state(step: int) -> dict:
    return {"params": {"w": jax.random.normal(jax.random.key(step), (1000,))}}


@pytest.fixture
def two(tmp_path) -> Path:
    """A directory with checkpoints 1 and 2."""
    checkpoints = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step), meta={"step": step})
    checkpoints.close()
    return tmp_path


def biggest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> str:
    path = biggest_file(step)
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.relative_to(step).as_posix()} has .* bytes instead of .*truncated"


def flip(step: Path) -> str:
    path = biggest_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path.relative_to(step).as_posix()} does not have the hash it was saved with"


def remove(step: Path) -> str:
    path = biggest_file(step)
    path.unlink()
    return f"{path.relative_to(step).as_posix()} cannot be read .No such file"


def remove_commit(step: Path) -> str:
    (step / "COMMIT").unlink()
    return "COMMIT is missing: never finished"


def tear_commit(step: Path) -> str:
    (step / "COMMIT").write_bytes((step / "COMMIT").read_bytes()[:20])
    return "COMMIT is not JSON"


def remove_manifest(step: Path) -> str:
    (step / "manifest.json").unlink()
    return "manifest.json cannot be read"


def edit_manifest(step: Path) -> str:
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text.replace('"float32"', '"float16"'))
    return "manifest.json is not the one that COMMIT was written for"


def newer_schema(step: Path) -> str:
    about = json.loads((step / "manifest.json").read_text())
    manifest.commit(step, {**about, "schema": 99})
    return "manifest.json has schema 99; this jaxdist reads schema 1"


def other_manifest(step: Path) -> str:
    manifest.commit(step, {"step": 2, "hello": "world"})
    return "manifest.json has no parts"


def other_parts(step: Path) -> str:
    manifest.commit(step, {"step": 2, "parts": {"trainer": ["d"]}, "metrics": {}, "meta": {}})
    return "manifest.json does not list files as ours does"


def other_checkpoint(step: Path) -> str:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("step_00000001"), step)
    return "manifest.json is of step 1, a foreign checkpoint"


DAMAGES = [
    truncate,
    flip,
    remove,
    remove_commit,
    tear_commit,
    remove_manifest,
    edit_manifest,
    newer_schema,
    other_manifest,
    other_parts,
    other_checkpoint,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_refused_by_name_and_the_last_good_one_used(two, damage):
    reason = damage(two / "step_00000002")
    checkpoints = Checkpointer(two)
    found = checkpoints.newest()
    assert (found.step, found.meta) == (1, {"step": 1})
    [(step, why)] = found.refused
    assert step == 2
    assert re.search(reason, why), why
    with pytest.raises(UserError, match=r"checkpoint 2 .* cannot be used"):
        checkpoints.restore(2, {"params": {"w": ONE}})
    restored = checkpoints.restore(1, {"params": {"w": ONE}})
    assert (restored["params"]["w"] == state(1)["params"]["w"]).all()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_refused_step_is_saved_anew_when_training_comes_by(two, damage):
    """Would catch a resumed run that takes the damaged step for saved, or counts it among those kept."""
    damage(two / "step_00000002")
    checkpoints = Checkpointer(two, keep=2)
    assert checkpoints.newest().step == 1
    checkpoints.save(2, state(2), meta={"again": True})
    checkpoints.wait()
    assert checkpoints.newest().meta == {"again": True}
    assert Checkpointer(two).newest().step == 2
    assert Checkpointer(two).steps() == [1, 2]


def test_a_refused_one_does_not_count_as_kept(two):
    flip(two / "step_00000002")
    checkpoints = Checkpointer(two, keep=2)
    checkpoints.newest()
    checkpoints.save(3, state(3), meta={})
    checkpoints.wait()
    flip(two / "step_00000003")
    assert Checkpointer(two).newest().step == 1


def test_a_flipped_byte_passes_only_where_hashes_are_not_asked_for(two):
    flip(two / "step_00000002")
    assert Checkpointer(two, verify="size").newest().step == 2
    truncate(two / "step_00000002")
    assert Checkpointer(two, verify="size").newest().step == 1


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_of_any_file_is_found(committed, position, bit, data):
    path = data.draw(st.sampled_from(sorted(path for path in committed.rglob("*") if path.is_file())))
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[int(position * len(content))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(UserError, match=re.escape(path.name)):
            Checkpointer(committed).newest()
    finally:
        path.write_bytes(content)
    assert Checkpointer(committed).newest().step == 1


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("committed")
    checkpoints = Checkpointer(directory)
    checkpoints.save(1, state(1), meta={})
    checkpoints.close()
    return directory


def test_a_run_never_starts_over_silently_when_all_are_refused(two):
    truncate(two / "step_00000001")
    flip(two / "step_00000002")
    with pytest.raises(UserError, match=r"none of its checkpoints can be believed(?s:.*)step 2: .*\n  step 1: "):
        Checkpointer(two).newest()


def test_a_first_save_that_never_finished_is_no_checkpoint(tmp_path):
    (tmp_path / "step_00000001" / "trainer").mkdir(parents=True)
    assert Checkpointer(tmp_path).newest() is None
    assert Checkpointer(tmp_path).steps() == []


def test_leftovers_are_cleaned_by_the_next_save_and_by_nothing_else(two):
    (two / "step_00000003" / "trainer").mkdir(parents=True)
    (two / "notes").mkdir()
    checkpoints = Checkpointer(two)
    checkpoints.newest()
    assert (two / "step_00000003").exists()
    (two / "step_00000008" / "shard-0").mkdir(parents=True)  # another writer's, begun after us
    checkpoints.save(4, state(4), meta={})
    checkpoints.wait()
    names = sorted(path.name for path in two.iterdir())
    assert names == ["notes", *(f"step_{step:08d}" for step in (1, 2, 4, 8))]
