"""The accuracy of every scheme beside fp32, and beside PyTorch's own, as a dated Markdown page, from the runs.

    python benchmarks/compression/accuracy.py RUNS -o benchmarks/compression/DATE-accuracy.md

RUNS holds what `jaxdist compare` left of the specs beside this file (compression-mnist1d, ...) and, in
compression-peers, what peers.py left. Beside the page, as .log, goes one line of JSON for each run. Nothing is
measured here; a run that is not there is not in its row's number of seeds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "single"))
import peers  # noqa: E402
from page import facts, table  # noqa: E402

WORKERS = 4
TASKS = {
    "mnist1d": "MNIST-1D, MLP of 0.29M parameters",
    "fashion_mnist": "Fashion-MNIST, CNN of 0.42M parameters",
    "bytes": "Bytes of the standard library, Transformer of 0.44M parameters",
}
PROMISED, WITHIN = {"fashion_mnist": ("int8", "topk", "powersgd_4")}, 0.5  # percentage points of fp32
BASELINE = {"jaxdist": "fp32", "PyTorch": "ddp_fp32"}


@dataclass(frozen=True)
class Run:
    task: str
    side: str  # a key of BASELINE
    scheme: str
    seed: int
    steps: int
    quality: float  # accuracy in percent; of a language model the loss
    sent: float  # bytes of one worker in a step, on average
    sent_later: float  # once warm-up is over
    seconds: float  # a step
    feedback: str
    torch: str = ""


@dataclass(frozen=True)
class Failure:
    task: str
    side: str
    scheme: str
    seed: int
    why: str


def jaxdist_runs(directory: Path, task: str) -> Iterator[Run | Failure]:
    spec = yaml.safe_load((HERE / f"{task}.yaml").read_text())
    for scheme in spec["variants"]:
        for seed in spec["seeds"]:
            run = directory / scheme / f"seed-{seed}"
            ended = run.with_name(f"{run.name}.json")
            outcome = json.loads(ended.read_text()) if ended.exists() else {"status": "missing"}
            if outcome["status"] == "done":
                yield _jaxdist_run(run, task, scheme, seed)
            elif outcome["status"] != "missing":
                yield Failure(task, "jaxdist", scheme, seed, outcome["reason"])


def _jaxdist_run(run: Path, task: str, scheme: str, seed: int) -> Run:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = next(record for record in reversed(records) if "eval.loss" in record)
    steps = [record for record in records if "loss" in record]
    first, middle, last = steps[0], steps[len(steps) // 2], steps[-1]
    block = yaml.safe_load((run / "config.yaml").read_text())["gradient_compression"]
    asked = block["error_feedback"] if isinstance(block["error_feedback"], dict) else {}
    remembers = "momentum correction" if asked.get("momentum") else "EF"
    return Run(
        task,
        "jaxdist",
        scheme,
        seed,
        last["step"],
        _quality(final),
        last["bytes_sent"] / last["step"] / WORKERS,
        (last["bytes_sent"] - middle["bytes_sent"]) / (last["step"] - middle["step"]) / WORKERS,
        (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]),
        remembers if "residual_norm" in last else "",
    )


def peer_runs(directory: Path, task: str) -> Iterator[Run | Failure]:
    for scheme in peers.TASKS[task]:
        for seed in peers.SEEDS:
            result = directory / scheme / f"seed-{seed}.json"
            log = result.with_suffix(".log")
            if result.exists():
                found = json.loads(result.read_text())
                feedback = "EF" if "powersgd" in scheme or scheme == "grace_topk" else ""
                bytes_sent = found["sent_a_step"], found["sent_a_compressed_step"]
                told = _quality(found), *bytes_sent, found["seconds_a_step"], feedback, found["torch"]
                yield Run(task, "PyTorch", scheme, seed, found["steps"], *told)
            elif log.exists() and (said := log.read_text().strip()):
                yield Failure(task, "PyTorch", scheme, seed, said.splitlines()[-1])


def _quality(measured: dict[str, Any]) -> float:
    """What a task is judged by: a classifier's accuracy; a language model's loss, as its accuracy says less."""
    tokens = "tokens_per_second" in measured or "eval.accuracy" not in measured
    return measured["eval.loss"] if tokens else 100 * measured["eval.accuracy"]


def section(task: str, title: str, found: list[Run | Failure]) -> str:
    runs = [run for run in found if isinstance(run, Run)]
    if len(numbers := {run.steps for run in runs}) > 1:
        raise SystemExit(f"{task}: runs of {sorted(numbers)} steps cannot be compared; remove those that are short")
    judged = "eval.loss, nats a byte" if task == "bytes" else "accuracy, %"
    header = [
        "scheme", "", judged, "difference from its fp32", "bytes a worker and step", "once warm", "fp32 / this",
        "s a step", "seeds",
    ]  # fmt: skip
    rows = []
    for side, scheme in dict.fromkeys((run.side, run.scheme) for run in runs):
        mine = [run for run in runs if (run.side, run.scheme) == (side, scheme)]
        base = {run.seed: run for run in runs if (run.side, run.scheme) == (side, BASELINE[side])}
        sent, later = (statistics.mean(getattr(run, name) for run in mine) for name in ("sent", "sent_later"))
        dense = statistics.mean(run.sent_later for run in base.values()) if base else float("nan")
        rows.append(
            [
                f"{side} {scheme}",
                mine[0].feedback,
                spread([run.quality for run in mine], ".3f" if task == "bytes" else ".2f"),
                "" if scheme == BASELINE[side] else difference(mine, base, task),
                f"{sent:,.0f}",
                f"{later:,.0f}" if abs(later - sent) > 0.01 * sent else "",
                f"{dense / later:.1f}",
                f"{statistics.median(run.seconds for run in mine):.4f}",
                str(len(mine)),
            ]
        )
    failures = {(f.scheme, f.why) for f in found if isinstance(f, Failure)}
    said = [f"- {scheme} failed: `{why}`" for scheme, why in sorted(failures)]
    told = f"{numbers.pop()} steps." if numbers else "No run."
    return "\n\n".join([f"## {title}", told, table(header, rows), *(["\n".join(said)] if said else [])])


def spread(values: list[float], form: str) -> str:
    """Mean, and the least and the greatest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def differences(mine: list[Run], base: dict[int, Run]) -> list[float]:
    return [run.quality - base[run.seed].quality for run in mine if run.seed in base]


def difference(mine: list[Run], base: dict[int, Run], task: str) -> str:
    found = differences(mine, base)
    return spread(found, "+.3f" if task == "bytes" else "+.2f") if found else "no fp32 run"


def promises(runs: list[Run]) -> str:
    """What was asked beside what was found."""
    rows = []
    for task, schemes in PROMISED.items():
        ours = [run for run in runs if (run.task, run.side) == (task, "jaxdist")]
        base = {run.seed: run for run in ours if run.scheme == BASELINE["jaxdist"]}
        for scheme in schemes:
            found = differences([run for run in ours if run.scheme == scheme], base)
            verdict = "not run" if not found else "met" if statistics.mean(found) >= -WITHIN else "missed"
            asked = f"at most {WITHIN} points below fp32"
            rows.append([f"{task}, {scheme}", asked, spread(found, "+.2f") if found else "", verdict])
    return "## Asked\n\n" + table(["", "asked", "found, mean of paired seeds (least to greatest)", ""], rows)


HOW = """Four workers, the same steps for all. Every seed gives a framework's schemes the same batches in the same
order and the same first parameters: differences are paired. jaxdist and PyTorch see the same batches; their first
parameters are other draws from the same distributions, so each side is compared with its own fp32. Nothing is tuned
for a scheme: all have fp32's learning rate. The settings of each are in the specs and in `torch_schemes.py`. Given
are means over seeds, with the least and the greatest.

- Bytes are what one worker sends in a step, on average over the run; it receives as many. jaxdist's are `bytes_sent`
  of the metrics, from the compiled program's collectives (`links.py` holds them against interfaces). PyTorch's are
  counted by the loopback interface of a network namespace that each run has to itself, frame headers included. "Once
  warm" leaves out dense and warm-up steps where there are any, and "fp32 / this" is of it.
- Seconds a step are of four workers that share the cores of one machine: four emulated devices in one process for
  jaxdist, four processes for PyTorch. They say what computing a scheme costs here, nothing about a network, and are
  not to be compared between the two.
- EF: what was not sent is added to the next gradient."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--grace", default="not given", help="where GRACE's code came from, for the page")
    args = parser.parse_args()
    found = {
        task: [
            *jaxdist_runs(args.runs / f"compression-{task}", task),
            *peer_runs(args.runs / "compression-peers" / task, task),
        ]
        for task in TASKS
    }
    everything = [run for runs in found.values() for run in runs]
    args.output.with_suffix(".log").write_text("".join(json.dumps(asdict(run)) + "\n" for run in everything))
    good = [run for run in everything if isinstance(run, Run)]
    commands = ["jaxdist compare benchmarks/compression/{mnist1d,fashion_mnist,bytes}.yaml"]
    commands += ["python benchmarks/compression/peers.py RUNS/compression-peers"]
    told = {
        "Commands": ", ".join(f"`{command}`" for command in commands),
        **facts(gpu=False),
        "Peers": ", ".join(sorted({f"PyTorch {run.torch}" for run in good if run.torch})) or "not run",
        **({"GRACE": args.grace} if any("grace" in run.scheme for run in everything) else {}),
        "Every run": f"[{args.output.stem}.log]({args.output.stem}.log)",
    }
    parts = [
        f"# Accuracy with compressed gradients, {args.output.stem.removesuffix('-accuracy')}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        HOW,
        promises(good),
        *(section(task, title, found[task]) for task, title in TASKS.items() if found[task]),
    ]
    args.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
