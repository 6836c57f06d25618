"""Eight emulated CPU devices for every test, and compiled programs kept between runs of the suite."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax is imported
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # small arrays: threads only cost

import jax
import pytest

assert len(jax.devices()) == 8, "jax was imported before tests/conftest.py could ask for 8 devices"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`: what starts processes, and waits for them, one after another beside all else, which goes file by
    file: the tests of one share fixtures and compiled programs."""
    for item in items:
        group = "processes" if item.get_closest_marker("processes") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _quiet_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
