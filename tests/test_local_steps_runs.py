"""Runs with local steps and gossip: what they say, when they wait, what they keep and go on from."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from replicas import build, difference, train

from jaxdist.checkpoint import Checkpointer
from jaxdist.run import Interrupted, run
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.runtime.stop import StopFlag
from jaxdist.sync.local_steps import OWN
from jaxdist.sync.own_state import abstract_own, restored_own
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.trained import evaluate_run


def last_state(directory: Path, *overrides: str, step: int, devices: int = 4) -> tuple[SyncStrategy, Any]:
    strategy = build(*overrides, devices=devices).strategy
    return strategy, strategy.restore(Checkpointer(directory / "checkpoints", keep=None, keep_best=None), step)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy={local_steps: 3, outer_optimizer: {kind: momentum}}", "gradient_compression={up: {kind: int4}}"),
        ("strategy={local_steps: 3, average: gossip, graph: exponential}",),
    ],
)
def test_a_run_says_what_it_did_at_every_step_and_resumes_with_the_same_bits(
    tmp_path: Path, options: tuple[str, ...]
):
    lasting = (*options, "train.budget.steps=12", "train.eval_every=4", "checkpoint.every=6")
    lasting = (*lasting, "telemetry.exposed_communication=true")
    whole = train(tmp_path, *lasting)
    assert not [problem for r in whole.records for problem in problems_of(r)]
    assert [r["step"] for r in whole.records] == list(range(1, 13))
    # Evaluations are due at 4, 8 and 12, and come at the next agreement.
    assert [r["step"] for r in whole.records if "eval.loss" in r] == [6, 9, 12]
    assert all(0 < r["consensus_distance"] < 1 for r in whole.records)
    (exposed,) = (event for event in whole.events if event["kind"] == "exposed_communication")
    assert exposed["steps"] == 3, "a whole round, its agreement included"
    assert exposed["fraction"] > 0
    if len(options) == 2:  # int4: a line without a ratio is of a step that has sent nothing yet
        ratios = [(r["step"], r["compression.ratio"]) for r in whole.records if "compression.ratio" in r]
        assert [step for step, _ in ratios] == [3, 6, 9, 12]
        assert all(ratio > 3 * 6 for _, ratio in ratios)
    # What is saved as the parameters is what was evaluated, also for who knows nothing of replicas.
    assert evaluate_run(tmp_path)["loss"] == pytest.approx(whole.records[-1]["eval.loss"], rel=1e-5)
    _, before = last_state(tmp_path, *options, step=12)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000012")
    again = train(tmp_path, *lasting)
    _, after = last_state(tmp_path, *options, step=12)
    assert [(r["attempt"], r["loss"]) for r in again.records[-6:]] == [(2, r["loss"]) for r in whole.records[-6:]]
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, after)
    assert all(jax.tree.leaves(same))


def test_another_number_of_replicas_goes_on_from_the_mean_of_what_each_had(tmp_path: Path):
    options = ("strategy={local_steps: 2, average: gossip}", "train.budget.steps=4")
    train(tmp_path, *options)
    _, four = last_state(tmp_path, *options, step=4)
    _, two = last_state(tmp_path, *options, "strategy.mesh.data=2", step=4, devices=2)
    for name in ("params", "opt_state"):
        own, fewer = (getattr(state.aggregate_state[OWN], name) for state in (four, two))
        for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(fewer), strict=True):
            assert np.asarray(y) == pytest.approx(np.stack([np.asarray(x).mean(0)] * 2), abs=1e-6)
    assert difference(four.params, two.params) == 0
    more = train(tmp_path, *options[:1], "train.budget.steps=6", "strategy.mesh.data=2", devices=2)
    assert [r["step"] for r in more.records][-2:] == [5, 6]


def test_a_new_run_from_parameters_starts_all_replicas_there(tmp_path: Path):
    train(tmp_path / "first", "train.budget.steps=4")
    options = ("strategy.local_steps=2", "train.budget.steps=2", "optimizer.learning_rate=0.0")
    start = f"checkpoint.init_from={tmp_path / 'first'}"
    train(tmp_path / "second", *options, start)
    _, first = last_state(tmp_path / "first", step=4)
    _, second = last_state(tmp_path / "second", *options, step=2)
    assert difference(first.params, second.params) < 1e-6


def test_a_loss_that_is_no_number_in_one_replica_ends_the_run_before_it_is_saved(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="nonfinite"):
        train(tmp_path, "strategy.local_steps=3", "optimizer={kind: sgd, learning_rate: 1.0e38, weight_decay: 1.0}")
    assert not list((tmp_path / "checkpoints").glob("*"))


class StopAt(StopFlag):
    """Asked at every step; a signal comes before the one with this number, counted from 1."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_a_signal_and_spent_seconds_wait_for_the_next_agreement(tmp_path: Path):
    every = ("strategy.local_steps=3", "train.budget.steps=30", "checkpoint.every=20")
    with StopAt(5) as stop, pytest.raises(Interrupted, match="step 6"):
        run(build(f"run.dir={tmp_path / 'signal'}", *every), stop, Stopwatch())
    assert [path.name for path in (tmp_path / "signal" / "checkpoints").iterdir()] == ["step_00000006"]
    spent = train(tmp_path / "seconds", "strategy.local_steps=3", "train.budget={seconds: 1.0e-9}")
    # The first step is not timed; what the third says is read when it is done.
    assert (spent.summary["status"], spent.records[-1]["step"]) == ("done", 3)


def test_agreeing_at_every_step_the_host_waits_no_more_than_in_plain_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    waits, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (waits.append(1), wait(x))[1])
    for directory, options in ((tmp_path / "plain", ()), (tmp_path / "own", ("strategy.average=gossip",))):
        train(directory, *options)
        waits.append(0)
    plain, own = "".join(map(str, waits)).split("0")[:2]
    assert own == plain


def test_updates_left_out_are_as_many_with_another_number_of_replicas():
    strategy = build("strategy.local_steps=2", "strategy.mesh.data=2", devices=2).strategy
    own = strategy.abstract_state().aggregate_state[OWN]
    saved = {f"aggregate_state/{OWN}/guard/accepted": {"shape": [4]}}
    wanted = abstract_own(strategy.local, own, strategy.mesh, saved)
    found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wanted)
    counts = {"skipped": jnp.array([1, 0, 2, 0]), "skipped_in_a_row": jnp.array([0, 3, 0, 1])}
    found["guard"] = dataclasses.replace(found["guard"], **counts)
    guard = restored_own(own, found).guard
    assert guard.skipped.tolist() == [3, 0]
    assert guard.skipped_in_a_row.tolist() == [3, 3]
