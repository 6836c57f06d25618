"""The commands as a user types them, on a language model small enough to train in seconds."""

import json
from pathlib import Path

import pytest

from jaxdist.cli import main

SMALL = [
    "model={layers: 1, width: 32, heads: 2, context: 32}",
    "optimizer={kind: adamw, learning_rate: 0.01}",
    "train={budget: {steps: 6}, global_batch_size: 16, eval_every: 3, eval_samples: 20}",
    "telemetry={log_every: 2, sample: {prompt: 'def ', tokens: 12}}",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run of six steps, and what training printed."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
    try:
        assert main(["train", "quickstart", f"run.dir={directory}", *SMALL]) == 0
    finally:
        capture.undo()
    return directory, "\n".join(printed)


def test_training_says_what_runs_what_to_beat_and_what_came_out(trained: tuple[Path, str]):
    directory, printed = trained
    for expected in (
        "8 x cpu",
        "parameters",
        "to beat ",
        "nats a token",
        "eval.loss",
        "unknown device",
        "'def ' continues",
    ):
        assert expected in printed, printed
    assert json.loads((directory / "summary.json").read_text())["status"] == "done"


def test_eval_of_a_run_gives_the_loss_that_training_measured(trained, capsys: pytest.CaptureFixture[str]):
    directory, _ = trained
    assert main(["eval", str(directory), "--samples", "20"]) == 0
    result = json.loads(capsys.readouterr().out)
    final = json.loads((directory / "summary.json").read_text())["final"]
    assert result["loss"] == pytest.approx(final["eval.loss"], rel=1e-6)


def test_generate_continues_the_prompt_and_is_the_same_for_the_same_seed(trained, capsys: pytest.CaptureFixture[str]):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(trained[0]), "--prompt", "import ", "--tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("import ") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_generate_with_temperature_0_takes_the_most_likely_token_one_by_one(trained):
    import jax
    import numpy as np

    from jaxdist.generate import generate
    from jaxdist.trained import build_run, read_parameters

    built = build_run(trained[0])
    params, state = read_parameters(trained[0], built)
    prompt = np.frombuffer(b"class Anything:\n    x = 1234567", np.uint8)
    assert len(prompt) == 31
    ours = generate(built.task, params, state, prompt, context=32, tokens=6, temperature=0.0, key=jax.random.key(0))
    seen, predict = prompt.tolist(), jax.jit(built.task.predict)
    for _ in range(6):  # by hand, without padding: the last position of the last 32 tokens
        window = np.asarray(seen[-32:], np.int32)[None]
        seen.append(int(np.argmax(predict(params, state, {"tokens": window})[0, -1])))
    assert ours.tolist() == seen[len(prompt) :]


def test_explain_shows_mesh_shardings_collectives_and_update(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "quickstart", "--explain", *SMALL, "train.accumulation_steps=2"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "Mesh: data 8; 8 workers",
        "uint8[2, 8, 33]  split over",
        "blocks/0/mlp_in/kernel",
        "matrix       float32[32, 128]  replicated",
        "all-reduce over data",
        "w <- w - t (m^ / (sqrt(v^) + eps))",
    ):
        assert expected in printed, printed
    assert "in a loop" not in printed


def test_a_dry_run_compiles_and_writes_nothing(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--dry-run", *SMALL]) == 0
    assert "compiles" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["eval", "nowhere"], "not a run directory"),
        (["generate", "nowhere", "--prompt", "x"], "not a run directory"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["data", "tokenize", "nothing*.txt", "-o", "x.bin"], "nothing*.txt"),
        (["data", "inspect", "nothing.bin"], "nothing.bin"),
    ],
)
def test_a_wrong_name_is_said_with_exit_code_2(command, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert expected in capsys.readouterr().err


def test_tokenize_then_train_on_the_file_then_generate(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    assert main(["data", "tokenize", "a.txt", "-o", "a.bin"]) == 0
    assert main(["data", "inspect", "a.bin"]) == 0
    assert "8,800" in capsys.readouterr().out
    assert main(["train", "quickstart", *SMALL, "data={kind: tokens, files: [a.bin]}", "run.dir=run"]) == 0
    assert main(["generate", "run", "--prompt", "the ", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("the ")
