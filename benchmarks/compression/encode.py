"""What encoding and decoding cost: milliseconds for each codec on one device, beside a plain copy of the array.

One array of `--size` float32 elements drawn from a normal distribution, all of it in one jitted program; medians of
`--repeats`, the codecs taking turns, so that a machine that drifts does not decide. "Both" is one program that
returns the payload and what comes back. The process runs with the settings under which `jaxdist train` runs on a CPU,
so that memory once touched is kept; the copy shows what reading and writing the array costs here.

    python benchmarks/compression/encode.py [--size 10000000] [--repeats 15] [--only Int8 Sign]
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxdist.runtime.allocator import SETTINGS, on_cpu

if on_cpu() and "GLIBC_TUNABLES" not in os.environ:  # glibc reads it when a process starts
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": SETTINGS})

import jax
import jax.numpy as jnp

from jaxdist import codecs
from jaxdist.codecs.codec import Codec, Keys, payload_bytes

CODECS: list[Any] = [
    codecs.BF16(),
    codecs.FP16(),
    codecs.FP8(),
    codecs.Int8(),
    codecs.Int8(rounding="stochastic"),
    codecs.Int4(),
    codecs.QSGD(),
    codecs.QSGD(bits=4),
    codecs.TernGrad(),
    codecs.Sign(),
    codecs.MajorityVote(),
    codecs.BlockTopK(),
    codecs.BlockTopK(block=256),
    codecs.TopK(),
    codecs.Threshold(),
    codecs.RandomK(),
    codecs.PowerSGD(),
]


class Timed:
    """Jitted functions, compiled once, and the seconds of their calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._calls: dict[str, Callable[[], Any]] = {}

    def add(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        jitted = jax.jit(function)
        self._calls[name] = lambda: jax.block_until_ready(jitted(*arguments))
        self.seconds[name] = []
        return self._calls[name]()

    def round(self) -> None:
        for name, call in self._calls.items():
            call()  # what ran before has left its own in the caches
            start = time.perf_counter()
            call()
            self.seconds[name].append(time.perf_counter() - start)

    def milliseconds(self, name: str) -> str:
        return f"{1e3 * statistics.median(self.seconds[name]):.1f}"


def add_codec(timed: Timed, codec: Codec, x: jax.Array, keys: Keys) -> None:
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    state = codec.init(spec, keys.shared)

    def both(x: jax.Array) -> Any:
        payload = jax.lax.optimization_barrier(codec.encode(x, state, keys)[0])
        return payload, codec.decode(payload, spec, keys.shared)

    payload = timed.add(f"{codec} encode", lambda x: codec.encode(x, state, keys)[0], x)
    timed.add(f"{codec} decode", lambda p: codec.decode(p, spec, keys.shared), payload)
    timed.add(f"{codec} both", both, x)


def machine() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ", ".join(f"{package} {version(package)}" for package in ("jax", "jaxlib"))
    return (
        f"{jax.devices()[0].device_kind}, {len(names)} x {names[0] if names else platform.machine()}, "
        f"Python {platform.python_version()}, {packages}, load {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="elements")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="*", help="names of codecs, such as Int8")
    arguments = parser.parse_args()
    print(machine(), flush=True)

    x = jax.random.normal(jax.random.key(0), (arguments.size,))
    keys = Keys(private=jax.random.key(1), shared=jax.random.key(2))
    rows = int(arguments.size**0.5)
    timed = Timed()
    timed.add("copy", lambda x: x + 1, x)
    chosen = [c for c in CODECS if not arguments.only or type(c).__name__ in arguments.only]
    arrays = {c: x[: rows * rows].reshape(rows, rows) if isinstance(c, codecs.PowerSGD) else x for c in chosen}
    for codec in chosen:
        add_codec(timed, codec, arrays[codec], keys)
    for _ in range(arguments.repeats):
        timed.round()

    print(
        f"\n{arguments.size} float32 elements, for PowerSGD a matrix of {rows} x {rows}; "
        f"medians of {arguments.repeats}\n"
    )
    print(
        "| codec | encode, ms | decode, ms | both, ms | bytes | ratio |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    print(f"| a plain copy | | | {timed.milliseconds('copy')} | {4 * x.size} | 1.0 |")
    for codec in chosen:
        times = [timed.milliseconds(f"{codec} {what}") for what in ("encode", "decode", "both")]
        array = arrays[codec]
        sent = payload_bytes(codec, jax.ShapeDtypeStruct(array.shape, jnp.float32))
        print(f"| {codec} | {' | '.join(times)} | {sent} | {4 * array.size / sent:.1f} |")


if __name__ == "__main__":
    main()
