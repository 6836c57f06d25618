"""Privacy shown: an image is read off one update, and not off one that is noised or masked."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.data.arrays import digits

PATH = Path(__file__).parent.parent / "benchmarks" / "federated" / "inversion.py"


@pytest.fixture(scope="module")
def inversion():
    spec = importlib.util.spec_from_file_location("inversion", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_image_is_read_off_an_update_and_neither_off_a_noised_nor_off_a_masked_one(inversion):
    task, data = inversion.perceptron(), digits().get(np.arange(20, 24))
    params, _ = task.init(jax.random.key(0))
    updates = inversion.updates_of(task, params, data["x"], data["y"])
    seen = inversion.views(updates, [8.0], jax.random.key(1))

    def decibels(name: str) -> float:
        view, count = seen[name]
        assert count == 1
        label = inversion.label_in(view)
        (made,) = inversion.reconstruct(task, params, view, label, jax.random.key(2), 400, 2)
        return inversion.psnr(np.asarray(made), data["x"][0])

    assert inversion.label_in(updates[0]) == data["y"][0]
    assert decibels("the update") > 25
    assert decibels("the update, clipped to a tenth") > 25, "a clip alone protects nothing"
    assert decibels("local privacy, epsilon 8 a message") < 12
    assert decibels("secure aggregation: the client's message") < 12
    total, _ = seen["secure aggregation: the sum of 4 clients"]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *updates)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), total, mean))) < 1e-5


def test_psnr_and_ssim_are_those_of_their_definitions(inversion):
    true = np.random.default_rng(0).uniform(size=(8, 8, 1))
    assert inversion.psnr(true + 0.1, true) == pytest.approx(20.0)
    assert inversion.ssim(true, true) == pytest.approx(1.0)
    assert inversion.ssim(1 - true, true) < 0
