"""A small comparison and a trainer that takes no time, for the tests of compare."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from jaxdist.config.study import load_study
from jaxdist.study.compare import Comparison, compare
from jaxdist.study.plan import Job

ROOT = Path(__file__).parent.parent
SPEC: dict[str, Any] = {
    "name": "small",
    "base": {
        "model": {"kind": "mlp", "hidden": [16]},
        "data": {"kind": "digits"},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "train": {"eval_every": 10},
    },
    "budget": {"steps": 90},
    "target": {"metric": "eval.loss", "value": 1.0},
    "variants": {"a": {}, "b": {"optimizer.learning_rate": 0.05}},
}
STAND_IN = [sys.executable, str(ROOT / "tests" / "stand_in_trainer.py")]


def comparison(folder: Path, **changes: Any) -> Comparison:
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, **changes}, sort_keys=False))
    study, _ = load_study(spec)
    return Comparison(study, spec, folder / "study")


def jobs(folder: Path, **changes: Any) -> dict[str, Job]:
    return {job.key: job for _, _, job in comparison(folder, **changes).planner().runs()}


def starts(folder: Path) -> Counter[str]:
    return Counter((folder / "starts").read_text().split())


def run_quietly(of: Comparison, **options: Any) -> tuple[int, list[str]]:
    lines: list[str] = []
    code = compare(of, lines.append, report=False, **options)
    return code, lines
