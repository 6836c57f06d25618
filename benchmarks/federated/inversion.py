"""Gradient inversion: what can be read off one client's update, with and without protection.

    python benchmarks/federated/inversion.py [--picture docs/_static/gradient_inversion.png]

The case that is easiest for who wants to know: a client with one image of a digit takes one step of SGD with a small
perceptron and sends what has changed. The label is read off the last bias (iDLG, Zhao et al. 2020, arXiv 2001.02610);
then an image is sought whose gradient points the same way (Zhu et al. 2019, arXiv 1906.08935, with the cosine
distance and total variation of Geiping et al. 2020, arXiv 2003.14053). Prints a table in Markdown: PSNR in dB and
SSIM beside the true image, means over several victims.
"""

import argparse
import functools
import struct
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.config.privacy import SecureAggregation
from jaxdist.data.arrays import digits
from jaxdist.federated.algorithm import fedavg
from jaxdist.federated.client import Global, Trainer
from jaxdist.federated.privacy.accountant import default_delta
from jaxdist.federated.privacy.central import Central
from jaxdist.federated.privacy.clip import clip, global_norm
from jaxdist.federated.privacy.local import local
from jaxdist.federated.schedule import Segment
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.client import Client
from jaxdist.federated.secure_aggregation.in_one_process import answer
from jaxdist.federated.secure_aggregation.messages import Masked
from jaxdist.federated.secure_aggregation.server import Server
from jaxdist.models.build import module_task
from jaxdist.models.mlp import MLP
from jaxdist.task import ModuleTask

RATE, HIDDEN = 0.1, 32
MEAN, NEAREST = "nothing: the mean of all digits", "nothing: the nearest image of the cohort's other clients"


def perceptron() -> ModuleTask:
    return module_task(lambda rngs: MLP(64, [HIDDEN], 10, rngs=rngs), classes=10)


def batch_of(images: Any, labels: Any) -> dict[str, Any]:
    count = len(labels)
    return {"x": images, "y": labels, "weight": jnp.ones(count), "sample_id": jnp.arange(count)}


def updates_of(task: ModuleTask, params: Any, images: np.ndarray, labels: np.ndarray) -> list[Any]:
    """The message of each client, which has one image: one local step as in any federated run."""
    trainer = Trainer(task, fedavg(), optax.sgd, (), ("accuracy",))
    given = Global(params, {}, (), jnp.float32(RATE), jax.random.key(0))
    segment = Segment(*[0] * len(Segment._fields))._replace(stop=1, num_steps=1, num_samples=1)

    @jax.jit
    def message(image: jax.Array, label: jax.Array) -> Any:
        state = trainer.initial_state(params, {})
        start, began = trainer.start(given, state, segment), trainer.begin(given, state)
        ended = trainer.run(began, given, start, segment, lambda i: batch_of(image[None], label[None]))
        return trainer.end(ended, start, segment, given.rate)[0]

    return [message(image, label) for image, label in zip(images, labels, strict=True)]


def total_variation(images_NxHxWx1: jax.Array) -> jax.Array:
    down, right = (jnp.abs(jnp.diff(images_NxHxWx1, axis=axis)).mean() for axis in (1, 2))
    return down + right


@functools.partial(jax.jit, static_argnames=("task", "steps", "restarts"))
def reconstruct(
    task: ModuleTask, params: Any, seen: Any, labels: jax.Array, key: jax.Array, steps: int = 1000, restarts: int = 4
) -> jax.Array:
    """Images [N, 8, 8, 1] in 0..1 with these labels [N], the mean of whose gradients points the way of `seen`.

    The best of several starts from noise, by what who attacks can see.
    """
    target, _ = jax.flatten_util.ravel_pytree(seen)

    def distance(images: jax.Array) -> jax.Array:
        def mean_loss(params: Any) -> Any:
            loss_sum, weight, _ = task.loss(params, {}, batch_of(images, labels), None)
            return loss_sum / weight

        found, _ = jax.flatten_util.ravel_pytree(jax.grad(mean_loss)(params))
        cosine = found @ target / jnp.maximum(jnp.linalg.norm(found) * jnp.linalg.norm(target), 1e-12)
        return 1 - cosine + 1e-4 * total_variation(images)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def attempt(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any, _: Any) -> Any:
            images, state = carry
            updates, state = optimizer.update(jax.grad(distance)(images), state)
            return (jnp.clip(optax.apply_updates(images, updates), 0, 1), state), None

        images = jax.random.uniform(key, (len(labels), 8, 8, 1))
        (images, _), _ = jax.lax.scan(step, (images, optimizer.init(images)), length=steps)
        return images, distance(images)

    images, distances = jax.vmap(attempt)(jax.random.split(key, restarts))
    return images[jnp.argmin(distances)]


def label_in(seen: Any) -> jax.Array:
    """[1]: of one image's update, old minus new, the only class whose bias goes up (Zhao et al. 2020)."""
    return jnp.argmin(seen["out"]["bias"])[None]


def privately(updates: list[Any], norm: float, noise_multiplier: float, key: jax.Array) -> Any:
    """What central privacy lets out: the noised mean of a cohort."""
    central = Central(noise_multiplier, len(updates), norm)
    of_clients = [central.client(update, jnp.float32(norm)) for update in updates]
    total = jax.tree.map(lambda *leaves: sum(leaves), *of_clients)
    return central.server(total, jnp.float32(norm), key)[0]


def secretly(updates: list[Any]) -> tuple[Any, Any]:
    """What a server sees of secure aggregation: (the first client's message, the mean of all)."""
    flat = [jax.flatten_util.ravel_pytree(update) for update in updates]
    rules, quantiser = build_secure_aggregation(SecureAggregation(range=1.0), len(flat), flat[0][0].size)
    clients = {i: Client(rules, b"inversion", i) for i in range(len(flat))}
    server, first = Server(rules, b"inversion", clients.keys()), None
    asked: dict[int, Any] = dict.fromkeys(clients)
    while server.result is None:
        for one, message in asked.items():
            said = answer(clients[one], message, quantiser.encode(np.asarray(flat[one][0])))
            if one == 0 and isinstance(said, Masked):
                first = said.vector.view(f"int{rules.word_bits}")[:-1] * quantiser.step
            server.receive(one, said)
        asked = dict(server.advance())
    assert first is not None
    mean, _ = quantiser.decode(server.result.total, len(flat))
    restore = flat[0][1]
    return restore(jnp.asarray(first, jnp.float32)), restore(jnp.asarray(mean, jnp.float32))


def views(updates: list[Any], epsilons: list[float], key: jax.Array) -> dict[str, tuple[Any, int]]:
    """What who attacks the first client has in hand, and the updates of how many clients are in it."""
    norm, delta = float(global_norm(updates[0])), default_delta(1000)
    masked, total = secretly(updates)
    of_local = {
        f"local privacy, epsilon {epsilon:g} a message": (local(norm, epsilon, delta).client(updates[0], key), 1)
        for epsilon in epsilons
    }
    cohort = len(updates)
    return {
        "the update": (updates[0], 1),
        "the update, clipped to a tenth": (clip(updates[0], norm / 10).update, 1),
        **of_local,
        f"the mean of {cohort} clients": (jax.tree.map(lambda *x: sum(x) / cohort, *updates), cohort),
        f"the mean of {cohort} clients, central privacy, multiplier 1": (privately(updates, norm, 1.0, key), cohort),
        "secure aggregation: the client's message": (masked, 1),
        f"secure aggregation: the sum of {cohort} clients": (total, cohort),
    }


def psnr(image: np.ndarray, true: np.ndarray) -> float:
    """In dB, of images in 0..1."""
    return float(-10 * np.log10(max(np.mean((image - true) ** 2), 1e-10)))


def ssim(image: np.ndarray, true: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, equation 13), one window of the whole 8 x 8 image; 1 is the same."""
    a, b = image.ravel().astype(np.float64), true.ravel().astype(np.float64)
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    means = (2 * a.mean() * b.mean() + 0.01**2) / (a.mean() ** 2 + b.mean() ** 2 + 0.01**2)
    return float(means * (2 * covariance + 0.03**2) / (a.var() + b.var() + 0.03**2))


def write_png(path: Path, grey: np.ndarray) -> None:
    """`grey`: uint8 [H, W]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # each line begins with its filter, 0
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    )


def drawn(rows: list[list[np.ndarray]], scale: int = 6, gap: int = 6) -> np.ndarray:
    """Images [8, 8, 1] in rows and columns: uint8 [H, W], ink dark."""
    tiles = [
        [np.kron(255 * (1 - np.clip(image[..., 0], 0, 1)), np.ones((scale, scale))) for image in row] for row in rows
    ]
    framed = [[np.pad(tile, gap // 2, constant_values=200) for tile in row] for row in tiles]
    return np.rint(np.concatenate([np.concatenate(row, axis=1) for row in framed])).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32, help="of the cohort, for what is summed")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8, 100, 1000, 10_000])
    parser.add_argument("--picture", type=Path, help="a PNG: a row for each way, a column for each victim")
    args = parser.parse_args()
    source, task = digits(), perceptron()
    data = source.get(np.random.default_rng(0).permutation(len(source)))
    params, _ = task.init(jax.random.key(0))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for victim in range(args.victims):
        own = slice(victim * args.clients, (victim + 1) * args.clients)
        images, labels, key = data["x"][own], data["y"][own], jax.random.key(victim)
        true = images[0]
        updates = updates_of(task, params, images, labels)
        found.setdefault("the true image", []).append((true, true))
        found.setdefault(MEAN, []).append((data["x"].mean(0), true))
        found.setdefault(NEAREST, []).append((max(images[1:], key=lambda image: psnr(image, true)), true))
        for name, (seen, count) in views(updates, args.epsilons, key).items():
            guessed = label_in(seen) if count == 1 else jnp.asarray(labels)  # labels of a sum are given away
            made = np.asarray(reconstruct(task, params, seen, guessed, key))
            best = max(made, key=lambda image: psnr(image, true))  # nor has who attacks to find out which is whose
            found.setdefault(name, []).append((best, true))
    print("| what is seen | PSNR, dB | SSIM |\n|---|---|---|")
    for name, pairs in list(found.items())[1:]:
        decibels, similar = np.mean([(psnr(*pair), ssim(*pair)) for pair in pairs], axis=0)
        print(f"| {name} | {decibels:.1f} | {similar:.2f} |")
    if args.picture is not None:
        rows = [[image for image, _ in pairs] for name, pairs in found.items() if name != NEAREST]
        write_png(args.picture, drawn(rows))


if __name__ == "__main__":
    main()
