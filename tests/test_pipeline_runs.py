"""Pipelines in runs: configs, checkpoints between layouts, reports, and what is refused with what would work."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdist
from jaxdist.chain import apart
from jaxdist.checkpoint import Checkpointer, to_canonical
from jaxdist.cli import main
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.source import Feature
from jaxdist.leaves import stacked_layers
from jaxdist.mesh import num_workers
from jaxdist.models.build import build_task
from jaxdist.models.transformer import TransformerTask
from jaxdist.run import build
from jaxdist.study.report.build import write_report
from jaxdist.sync.loop import VOTES
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.strategy import build as build_sync
from jaxdist.trained import evaluate_run

SHAPE = {"layers": 5, "width": 16, "heads": 2, "context": 8}


def config(*overrides: str) -> Any:
    return load(
        {
            "name": "staged",
            "model": {"kind": "transformer", **SHAPE, "bias": False},
            "data": {"kind": "python_stdlib", "validation_fraction": 0.1},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2, "clip_norm": 0.5},
            "train": {"global_batch_size": 16, "budget": {"steps": 4}, "eval_every": 4, "eval_samples": 20},
            "telemetry": {"progress": "none", "log_every": 1},
        },
        list(overrides),
    ).config


@functools.cache
def everything() -> Any:
    return build(config("strategy.mesh.data=8"))


def strategy_on(sizes: dict[str, int], *overrides: str) -> SyncStrategy:
    whole = everything()
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = ", ".join(f"{axis}: {size}" for axis, size in {"data": 1, **sizes}.items())
    asked = config(f"strategy.mesh={{{mesh}}}", *overrides)
    task = TransformerTask(256, **SHAPE, bias=False, scan_layers=asked.model.scan_layers)
    return build_sync(asked, dataclasses.replace(whole.topology, devices=devices), task, whole.data)


def one_step(strategy: SyncStrategy, state: Any) -> Any:
    tokens = np.random.default_rng(int(state.step)).integers(0, 256, (1, 16, 9)).astype(np.uint8)
    batch = {
        "tokens": tokens,
        "sample_id": np.arange(16, dtype=np.int32)[None],
        "weight": np.ones((1, 16), np.float32),
    }
    batch = {
        name: jax.device_put(batch[name].astype(x.dtype), x.sharding) for name, x in strategy.abstract_batch().items()
    }
    votes = jnp.zeros((num_workers(strategy.mesh), len(VOTES)))
    return jax.jit(strategy.functions.step, out_shardings=(strategy._shardings(), None))(state, batch, votes)[0]


def layers_of(strategy: SyncStrategy) -> Any:
    return stacked_layers(strategy.leaves, strategy.abstract_state().model_state)


INTERLEAVED = "strategy.pipeline={schedule: interleaved, microbatches: 4, chunks: 2}"
PATHS = [
    [({"stage": 2, "tensor": 2}, ""), ({"fsdp": 4}, ""), ({"data": 1}, "")],
    [({"fsdp": 2}, "model.scan_layers=true"), ({"stage": 4}, ""), ({"data": 2, "stage": 2}, INTERLEAVED)],
]


@pytest.mark.parametrize("path", PATHS)
def test_a_checkpoint_restores_between_any_two_layouts_and_training_goes_on_the_same(path: Any, tmp_path: Path):
    alone = strategy_on({"data": 1})
    expected = one_step(alone, alone.init_state())
    (sizes, how), *rest = path
    strategy = strategy_on(sizes, *filter(None, [how]))
    state = one_step(strategy, strategy.init_state())
    for count, (sizes, how) in enumerate(rest, start=1):
        checkpoints = Checkpointer(tmp_path / str(count), stacked=layers_of(strategy))
        checkpoints.save(count, state, meta={})
        checkpoints.wait()
        before = to_canonical(state, layers_of(strategy))
        strategy = strategy_on(sizes, *filter(None, [how]))
        state = Checkpointer(tmp_path / str(count), stacked=layers_of(strategy)).restore(
            count, strategy.abstract_state()
        )
        after = to_canonical(state, layers_of(strategy))
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(value, after[name], err_msg=name)
        state, expected = one_step(strategy, state), one_step(alone, expected)
    theirs = to_canonical(expected, layers_of(alone))
    for name, value in to_canonical(state, layers_of(strategy)).items():
        if name.startswith("params/"):
            np.testing.assert_allclose(value, theirs[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_rows_that_hold_no_block_stay_zero_and_are_not_saved():
    strategy = strategy_on({"stage": 2}, "optimizer={kind: muon, learning_rate: 0.1}", "optimizer.clip_norm=0.1")
    state = one_step(strategy, strategy.init_state())
    kernel = np.asarray(state.params["blocks"]["mlp_in"]["kernel"])
    leaf = strategy.leaves["blocks"]["mlp_in"]["kernel"]
    assert leaf.layers.count(None) == 1
    assert not kernel[leaf.layers.index(None)].any()
    names = [name for name in to_canonical(state.params, layers_of(strategy)) if name.endswith("mlp_in/kernel")]
    assert names == [f"blocks/{i}/mlp_in/kernel" for i in range(5)]


@functools.cache
def run_on(directory: Path, mesh: str, *overrides: str) -> Any:
    return jaxdist.train(config(f"strategy.mesh={mesh}", f"run.dir={directory}", *overrides))


def test_a_run_over_stages_is_that_of_replicas_and_can_be_used_and_shown(tmp_path: Path, capsys: Any):
    common = ("model.dropout=0.1",)
    replicas = run_on(tmp_path / "replicas", "{data: 8}", *common)
    stages = run_on(
        tmp_path / "stages", "{data: 2, stage: 2, tensor: 2}", "strategy.pipeline.microbatches=4", *common
    )
    np.testing.assert_allclose(stages.metrics["loss"], replicas.metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(stages.metrics["grad_norm"], replicas.metrics["grad_norm"], rtol=1e-4)
    evaluated = stages.summary["final"]["eval.loss"]
    np.testing.assert_allclose(evaluated, replicas.summary["final"]["eval.loss"], rtol=1e-5)
    np.testing.assert_allclose(evaluate_run(tmp_path / "stages", samples=20)["loss"], evaluated, rtol=1e-5)
    assert main(["generate", str(tmp_path / "stages"), "--prompt", "def ", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def ")

    report = write_report([tmp_path / "stages"], tmp_path / "report.html")
    panels = {panel["title"]: panel for part in report["sections"] for panel in part["panels"]}
    shown = panels["Schedule 1f1b, 2 stages, 4 microbatches"]
    assert shown["values"][0][:4] == [1, 2, None, 3]
    assert [cell["text"] for cell in panels["Pipelines"]["rows"][0]["cells"][1:4:2]] == ["1f1b", "2+3"]


def test_bf16_and_compressed_gradients_train_over_stages(tmp_path: Path):
    overrides = ("train.precision=bf16", "gradient_compression.up.kind=int8", "train.accumulation_steps=2")
    run = run_on(tmp_path / "bf16", "{data: 2, stage: 2, tensor: 2}", "strategy.pipeline.microbatches=2", *overrides)
    plain = run_on(tmp_path / "plain", "{data: 8}", "train.precision=bf16", "train.budget.steps=1")
    assert abs(run.metrics["loss"][0] / plain.metrics["loss"][0] - 1) < 1e-2
    assert run.metrics["loss"][-1] < run.metrics["loss"][0]


def pictures(info: Any) -> Any:
    """As if the data were 12 numbers of 5 classes."""
    of = {"x": Feature((12,), np.dtype("float32")), "y": Feature((), np.dtype("int32"))}
    return dataclasses.replace(info, features=of, classes=5)


def test_an_mlp_is_a_chain_where_its_hidden_layers_are_alike():
    data = everything().data.info
    info = pictures(data)
    for hidden, blocks in (([16, 16, 16], 2), ([16, 8], None), ([16], None)):
        found = apart(build_task(config(f"model={{kind: mlp, hidden: {hidden}}}").model, info))
        assert (None if found is None else found.chain.num_blocks) == blocks


# Refused, with what would work

REFUSED = [
    (["strategy.mesh={data: 1, stage: 8}"], "8 stages for 5 blocks leave some without one; use at most as many"),
    (
        ["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.microbatches=1"],
        r"leave most of them waiting.*: 2, 4$",
    ),
    (
        ["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.microbatches=3"],
        r"does not divide the 4 samples.*2, 4$",
    ),
    (["strategy.mesh={data: 2, stage: 4}", "train.global_batch_size=4"], "4 stages cannot share the 2 samples"),
    (
        ["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline={schedule: interleaved, microbatches: 3}"],
        r"no multiple of 2 stages.*: 2, 4$",
    ),
    (
        ["strategy.mesh={data: 2, stage: 4}", "strategy.pipeline.schedule=interleaved"],
        "4 stages x 2 chunks for 5 blocks leave some without one; use fewer stages or chunks",
    ),
    (
        ["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.layers=[3, 3]"],
        "are 6 blocks in 2 parts; the model has 5",
    ),
    (
        ["strategy.mesh={data: 4, stage: 2}", "model_compression.prune={method: magnitude, sparsity: 0.5}"],
        r"prune: counts the layers .* \[2, 3\] blocks",
    ),
    (["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.costs=[1.0]"], "1 of them for 5 blocks"),
    (["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.memory_gib=1e-6"], "no room for one block"),
    (["strategy.mesh={data: 4, stage: 2}", "strategy.pipeline.memory_gib=1e-4"], "GiB do not hold 3 blocks"),
]


@pytest.mark.parametrize(("overrides", "why"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_would(overrides: list[str], why: str):
    whole = everything()
    asked = config(*overrides)
    with pytest.raises(UserError, match=why):
        build_sync(asked, whole.topology, whole.task, whole.data)


def test_a_vocabulary_that_stages_cannot_share_is_refused_with_how_to_pad_it():
    whole = everything()
    task = TransformerTask(250, **SHAPE)
    with pytest.raises(UserError, match=r"pad_vocabulary=4 makes them 252"):
        build_sync(config("strategy.mesh={data: 2, stage: 4}"), whole.topology, task, whole.data)


def test_a_model_that_is_no_chain_is_refused():
    whole = everything()
    task = build_task(config("model={kind: mlp, hidden: [8]}").model, pictures(whole.data.info))
    with pytest.raises(UserError, match="need a model that is a chain of blocks"):
        build_sync(config("strategy.mesh={data: 4, stage: 2}"), whole.topology, task, whole.data)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["strategy.pipeline.microbatches=4"], "no effect with mesh.stage: 1"),
        (["strategy.mesh.stage=2", "strategy.pipeline.chunks=3"], "chunks has no effect with schedule: 1f1b"),
        (["strategy.mesh.stage=2", "strategy.pipeline={layers: [3, 2], costs: [1.0]}"], "costs has no effect"),
        (["strategy.mesh.stage=2", "simulate={nodes: 2}"], "simulate"),
    ],
)
def test_options_without_effect_are_refused(overrides: list[str], why: str):
    with pytest.raises(ConfigError, match=why):
        config(*overrides)


# jaxdist plan --schedule


def test_plan_prints_the_schedule_before_anything_runs(tmp_path: Path, capsys: Any):
    path = tmp_path / "staged.yaml"
    path.write_text(
        json.dumps(config("strategy.mesh.stage=2", "strategy.pipeline.microbatches=4").model_dump(mode="json"))
    )
    assert main(["plan", str(path), "--schedule"]) == 0
    out = capsys.readouterr().out
    assert "Pipeline: 1f1b, 2 stages, 4 microbatches of 4 samples" in out
    assert "stage 0: blocks 0-1 (1 empty slot)" in out
    assert "stage 1: blocks 2-4" in out
    assert "stage 0 F0 F1  . F2 B0 F3 B1  . B2 B3" in out
    assert "zb_h1" in out
    assert main(["plan", str(path), "--schedule", "--json", "strategy.mesh.data=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bubble"], found["layers"], found["samples"]) == (0.2, [2, 3], 2)
    assert main(["plan", str(path), "--schedule", "--measure"]) == 0
    costs = capsys.readouterr().out.split("strategy.pipeline.costs='")[1].split("'")[0]
    assert len(json.loads(costs)) == 5
    assert main(["plan", "quickstart", "--schedule"]) == 2
    assert "no pipeline, strategy.mesh.stage is 1" in capsys.readouterr().err
