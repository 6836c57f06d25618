"""The house: imports go down only, strategies do not know each other, files stay small, code is in order."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdist"
STRATEGIES = {"sync", "parameter_server", "federated"}
LAYERS = [
    {"config"},
    {"task", "chain", "leaves", "gather", "sharding", "randomness", "mesh", "state_specs", "models",
     "health", "batch_sizes",
     "pretrained", "data", "optimizer", "checkpoint", "telemetry", "runtime", "evaluate", "generate", "export"},
    {"codecs", "model_compression", "balance", "transport", "simulate"},
    STRATEGIES,
    {"record", "elastic", "flower", "run", "same_run", "trained"},
    {"cli", "cluster", "plan", "study", "__init__", "__main__"},
]  # fmt: skip


def layer(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"jaxdist.{name} has no layer: give it one in {Path(__file__).name}"
    return found[0]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, name below jaxdist) of every import of the package, type-checking imports too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "jaxdist" else [f"jaxdist.{a.name}" for a in node.names]
        found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith("jaxdist.")]
    return found


def test_imports_go_down_only_and_strategies_never_import_each_other():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        me = relative.parts[0].removesuffix(".py")
        for line, other in imports_of(path):
            up = layer(other) > layer(me)
            across = {me, other} <= STRATEGIES and me != other
            if up or across:
                wrong.append(f"{relative}:{line}: {me} imports {other}")
    assert not wrong


def test_config_imports_no_jax():
    script = "import sys, jaxdist.config.load; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_only_the_checkpoint_layer_imports_orbax():
    others = [p for p in PACKAGE.rglob("*.py") if "import orbax" in p.read_text() or "from orbax" in p.read_text()]
    assert {p.parent.name for p in others} == {"checkpoint"}


def test_files_are_small_and_have_names_that_say_what_they_hold():
    lengths = sorted(len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py"))
    assert lengths[len(lengths) // 2] < 200
    assert lengths[-1] <= 500
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "jaxdist", "tests", "benchmarks"],
        ["ruff", "format", "--check", "jaxdist", "tests", "benchmarks"],
        ["mypy"],
    ],
    ids=["lint", "format", "types"],
)
def test_code_is_in_order(command: list[str]):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
