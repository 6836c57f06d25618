"""What both sides train: shapes, settings and the very same batches. NumPy only."""

import sysconfig
from pathlib import Path

import numpy as np

GPT = {"layers": 4, "width": 256, "heads": 4, "context": 128}
VOCABULARY = 256  # bytes
CNN = {"channels": [32, 64], "hidden": 128}
CLASSES = 10
BATCH = {"gpt": 16, "cnn": 128}
ADAM = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}  # the CNN's Adam: no decay
NUM_BATCHES = 16  # used in turn; on the devices before the clock starts


def batches(model: str) -> list[dict[str, np.ndarray]]:
    """Global batches. gpt: tokens uint8 [B, context + 1]; cnn: x float32 [B, 28, 28, 1], y int32 [B]."""
    samples = NUM_BATCHES * BATCH[model]
    fields = text(samples, GPT["context"]) if model == "gpt" else images(samples)
    parts = [np.split(array, NUM_BATCHES) for array in fields.values()]
    return [dict(zip(fields, batch, strict=True)) for batch in zip(*parts, strict=True)]


def text(samples: int, context: int) -> dict[str, np.ndarray]:
    """Windows of the standard library's source, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    stream = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    return {"tokens": stream[: samples * (context + 1)].reshape(samples, context + 1)}


def images(samples: int) -> dict[str, np.ndarray]:
    """A pattern for each class, under noise that is larger than it."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, samples).astype(np.int32)
    patterns = 0.25 * random.standard_normal((CLASSES, 28, 28, 1))
    return {"x": (patterns[labels] + random.standard_normal((samples, 28, 28, 1))).astype(np.float32), "y": labels}
