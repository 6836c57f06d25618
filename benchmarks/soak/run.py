"""A job whose ranks are killed again and again: does it come through, and at what price?

A launcher keeps a two-process job alive while a seeded schedule kills a random rank with SIGKILL every 20 to 60
seconds. Afterwards the same run is done undisturbed: every recorded loss must be the same bit for bit, which a sample
left out or used twice would change. Goodput is steps kept / steps computed; it is compared with what the kills, the
interval of the checkpoints and the time of a commit predict.

    python benchmarks/soak/run.py DIRECTORY [--seconds 1800] [--seed 0] [--markdown FILE]
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "single"))
from page import facts, keep_log, log, table  # noqa: E402

BATCH, EVERY, LOG_EVERY, STEP_SECONDS = 32, 200, 5, 0.025
CONFIG: dict[str, Any] = {
    "name": "soak",
    "model": {"kind": "cnn", "channels": [4], "hidden": 16, "dropout": 0.1},
    "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "train": {"global_batch_size": BATCH},
    "checkpoint": {"every": EVERY},
    "telemetry": {"log_every": LOG_EVERY},
}


def launch(directory: Path, steps: int, seconds_per_sample: float) -> subprocess.Popen[bytes]:
    data = {"target": "slow_digits:SlowDigits", "seconds_per_sample": seconds_per_sample}
    config = {**CONFIG, "data": data}
    config["train"] = {**CONFIG["train"], "budget": {"steps": steps}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["launch", "--procs", "2", "--max-restarts", "100000", "--", "train", str(directory / "config.yaml")]
    with (directory / "launcher.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "jaxdist", *command, f"run.dir={directory / 'run'}"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def process_of(run: Path, rank: int) -> int:
    return int(re.findall(r"process id (\d+)", (run / "logs" / f"rank-{rank}.log").read_text())[-1])


def torment(directory: Path, seconds: float, seed: int) -> tuple[list[float], int]:
    """(when a rank was killed, the launcher's exit code)."""
    draw, kills = random.Random(seed), []
    job = launch(directory, 10**9, STEP_SECONDS / (BATCH / 2))
    until = time.time() + seconds
    while (pause := draw.uniform(20, 60)) + time.time() < until:
        time.sleep(pause)
        rank = draw.randrange(2)
        assert job.poll() is None, "the launcher gave up; see launcher.log"
        try:
            os.kill(process_of(directory / "run", rank), signal.SIGKILL)
        except ProcessLookupError:
            log(f"rank {rank} was just being started again: not killed")
            continue
        kills.append(time.time())
        log(f"{datetime.now().time().isoformat('seconds')} rank {rank} killed ({len(kills)})")
    time.sleep(max(0.0, until - time.time()))
    job.send_signal(signal.SIGTERM)
    return kills, job.wait()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def when(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def measure(run: Path, kills: list[float], seconds: float) -> dict[str, float]:
    """Goodput as measured and as predicted, and what the prediction is made of."""
    events, records = lines(run / "events.jsonl"), lines(run / "metrics.jsonl")
    attempts = sorted({record["attempt"] for record in records})
    began = {e["attempt"]: e.get("step", 0) for e in events if e["kind"] in ("start", "resume")}
    of = {attempt: [r for r in records if r["attempt"] == attempt] for attempt in attempts}
    computed = sum(of[attempt][-1]["step"] - began[attempt] for attempt in attempts)
    kept = max(record["step"] for record in records)
    paces = [
        (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])
        for rows in of.values()
        if rows[-1]["step"] > rows[0]["step"]
    ]
    step = mean(paces)
    commit = mean(event["seconds"] for event in events if event["kind"] == "committed")
    restarts = [min(when(e) for e in events if e["kind"] == "resume" and when(e) > kill) - kill for kill in kills]
    lost_at_a_kill = EVERY / 2 + commit / step  # of a checkpoint on its way nothing is left
    predicted = (seconds - (len(kills) + 1) * mean(restarts)) / step  # steps in the time that restarts leave
    return {
        "kills": len(kills),
        "steps kept": kept,
        "steps computed": computed,
        "goodput": kept / computed,
        "predicted": 1 - len(kills) * lost_at_a_kill / predicted,
        "seconds of a step": step,
        "seconds to a commit": commit,
        "seconds from kill to resume": mean(restarts),
        "longest": max(restarts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with keep_log(args.markdown and args.markdown.with_suffix(".log")):
        known = facts(gpu=False)
        for name, value in known.items():
            log(f"{name}: {value}")
        kills, code = torment(args.directory / "killed", args.seconds, args.seed)
        assert code == 75, f"stopped by a signal, the launcher should leave with 75, not {code}"
        found = measure(args.directory / "killed/run", kills, args.seconds)
        steps = int(found["steps kept"])
        assert launch(args.directory / "undisturbed", steps, 0.0).wait() == 0
        compared = same_losses(args.directory, steps)
        found |= {"losses compared": compared}
        for name, value in found.items():
            log(f"{name}: {value:.6g}")
        error = abs(found["goodput"] - found["predicted"]) / found["predicted"]
        log(f"goodput differs from the prediction by {100 * error:.1f} %")
        if args.markdown:
            title = f"# Soak, {datetime.now().date().isoformat()}"
            command = f"`python benchmarks/soak/run.py DIRECTORY --seconds {args.seconds:g} --seed {args.seed}`"
            told = "\n".join(f"- {name}: {value}" for name, value in {"Command": command, **known}.items())
            rows = [[name, f"{value:.6g}"] for name, value in found.items()]
            args.markdown.write_text(
                "\n\n".join([title, told, __doc__.split("\n\n")[1], table(["", ""], rows)]) + "\n"
            )


def same_losses(directory: Path, steps: int) -> int:
    """How many recorded losses were compared. Raises AssertionError at the first that differs."""
    from jaxdist import load_run

    killed, undisturbed = (load_run(directory / name / "run") for name in ("killed", "undisturbed"))
    expected = {record["step"]: record["loss"] for record in undisturbed.records if "loss" in record}
    found = {record["step"]: record["loss"] for record in killed.records if "loss" in record}
    assert found.keys() >= set(range(LOG_EVERY, steps, LOG_EVERY)), "records are missing"
    for step in sorted(found.keys() & expected.keys()):
        assert found[step] == expected[step], f"step {step}: {found[step]} after kills, {expected[step]} undisturbed"
    return len(found.keys() & expected.keys())


if __name__ == "__main__":
    main()
