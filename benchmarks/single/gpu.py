"""jaxdist on one GPU: tokens a second and memory of GPT-2 124M, of a quarter of Llama 3 8B and of Llama 2 7B whole.

Each row is a process of its own, so that its peak memory is its own; one that does not fit, or fails, says why
and the sweep goes on. Started without arguments by run.py --gpu; as a child it is given the row as JSON.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from page import log, table

from jaxdist.config.load import load

GPT2 = {
    "layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "context": 1024, "mlp_width": 3072, "norm": "layernorm",
    "positions": "learned", "activation": "gelu", "bias": True, "tied_embedding": True, "pad_vocabulary": 64,
}  # fmt: skip
LLAMA_LAYERS = 8  # of Llama 3 8B's 32: what fits one 80 GB GPU with fp32 masters, gradients and Adam's moments
LLAMA = {
    "layers": LLAMA_LAYERS, "width": 4096, "heads": 32, "kv_heads": 8, "context": 4096, "mlp_width": 14336,
    "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_embedding": False,
}  # fmt: skip
LLAMA2_7B = {
    "layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "context": 4096, "mlp_width": 11_008,
    "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_embedding": False,
}  # fmt: skip

Row = dict[str, Any]


def _rows(
    batches: list[int],
    remats: list[str],
    loss_chunk: int,
    attentions: Sequence[str] = ("cudnn", "xla"),
    scans: Sequence[bool] = (False, True),
) -> list[Row]:
    """Every combination, but XLA's attention at the smallest batch only: its T x T numbers soon fill the memory."""
    return [
        {"batch": batch, "attention": attention, "scan_layers": scan, "remat": remat, "loss_chunk": loss_chunk}
        for batch in batches
        for remat in remats
        for attention in (attentions if batch == min(batches) else attentions[:1])
        for scan in scans
    ]


@dataclass(frozen=True)
class Sweep:
    title: str
    shape: dict[str, Any]
    vocabulary: int
    rows: list[Row]
    target: float | None = None  # tokens a second on one H200, at least


SWEEPS = {
    "gpt2": Sweep("GPT-2 124M, bf16, context 1024", GPT2, 50_257, _rows([16, 32, 64], ["none"], 4096), 475_000),
    "llama": Sweep(
        f"Llama 3 8B's shape, {LLAMA_LAYERS} of 32 layers, vocabulary 32,000, bf16, context 4096",
        LLAMA,
        32_000,  # Llama 3's own 128,256 would outweigh so few layers
        _rows([2, 4], ["dots", "full"], 2048),
    ),
    "llama_7b": Sweep(  # 6.74e9 parameters of 16 bytes, 108 GB: for a GPU of the H200's 141 GB
        "Llama 2 7B's shape, whole, bf16, context 4096",
        LLAMA2_7B,
        32_000,
        _rows([1, 2, 4], ["full", "dots"], 2048, attentions=("cudnn",), scans=(True,)),
        10_500,
    ),
}
STEPS, WARM_UP, ROUNDS = 10, 3, 3
TIME_LIMIT = 900  # seconds of one row, compilation included


def sweep(name: str, overrides: list[str]) -> str:
    """Every row of one model; a Markdown section with the best one named, beside what is asked."""
    chosen, cells = SWEEPS[name], []
    log(f"\n## {chosen.title}")
    best: tuple[Row, Row] | None = None  # (row, answer)
    for row in chosen.rows:
        answer = _measure(name, row, overrides)
        log(f"  {json.dumps(row)} -> {json.dumps(answer)}")
        cells.append([str(row[key]) for key in ("batch", "attention", "scan_layers", "remat")] + _shown(answer))
        if "error" not in answer and (best is None or answer["tokens_per_second"] > best[1]["tokens_per_second"]):
            best = row, answer
    header = ["micro-batch", "attention", "scanned", "remat", "tokens/s, median (min to max)", "ms a step",
              "TFLOP/s (of peak)", "peak memory, GiB", "compile, s", "loss"]  # fmt: skip
    return f"## {chosen.title}\n\n{table(header, cells)}\n\n{_verdict(best, chosen.target)}"


def _verdict(best: tuple[Row, Row] | None, target: float | None) -> str:
    asked = "" if target is None else f" Asked on one H200: at least {target:,.0f} tokens/s"
    if best is None:
        return "No row ran." + (f"{asked}; not measured." if asked else "")
    row, answer = best
    found = f"Best: {answer['tokens_per_second']:,.0f} tokens/s on {answer['device']} with {json.dumps(row)}."
    if target is None:
        return found
    if "H200" not in answer["device"]:
        return f"{found}{asked}; this is another GPU."
    return f"{found}{asked}; {'reached' if answer['tokens_per_second'] >= target else 'missed'}."


def _shown(answer: Row) -> list[str]:
    if "error" in answer:
        return [answer["error"].replace("|", "/"), *[""] * 5]
    share = "unknown" if answer["mfu"] is None else f"{100 * answer['mfu']:.1f} %"
    memory = "not told" if answer["peak_bytes"] is None else f"{answer['peak_bytes'] / 2**30:.1f}"
    rounds = [answer["tokens_per_second"] * answer["seconds"] / seconds for seconds in answer["round_seconds"]]
    return [
        f"{answer['tokens_per_second']:,.0f} ({min(rounds):,.0f} to {max(rounds):,.0f})",
        f"{answer['seconds'] * 1e3:.1f}", f"{answer['flops_per_second'] / 1e12:.1f} ({share})", memory,
        f"{answer['compile_seconds']:.0f}", f"{answer['losses'][0]:.3f} to {answer['losses'][1]:.3f}",
    ]  # fmt: skip


def _measure(name: str, row: Row, overrides: list[str]) -> Row:
    """What the row's process answers, or {"error": why there is no answer}."""
    command = [sys.executable, __file__, name, json.dumps(row), *overrides]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=TIME_LIMIT,
            check=False,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"over {TIME_LIMIT} s"}
    except (ValueError, IndexError):
        return {"error": "ended without an answer"}
    log(done.stderr[-3000:])
    return {"error": _why(done.returncode, done.stderr)}


def _why(code: int, stderr: str) -> str:
    """One line. Memory runs out while XLA compiles, allocates or computes, as an exception or as an abort."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    signs = ("resource_exhausted", "out of memory", "out_of_memory")
    full = [line for line in lines if any(sign in line.lower() for sign in signs)]
    if full:
        return f"does not fit: {full[-1][:160]}"
    if code == -signal.SIGKILL:
        return "killed by the system: the host's memory may be too small"
    return f"failed, code {code}: {lines[-1][:160] if lines else 'no message'}"


def _child(name: str, row: Row, overrides: list[str]) -> Row:
    """Build the row's run, train a few steps and say how fast they were."""
    import jax
    from jaxdist_steps import build_run, step_case

    from jaxdist.data.arrays import Arrays
    from jaxdist.data.build import streams
    from jaxdist.telemetry.peak import peak_flops

    chosen = SWEEPS[name]
    settings = {
        "name": name,
        "model": {"kind": "transformer", **chosen.shape, **{k: v for k, v in row.items() if k != "batch"}},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1},
        "train": {"global_batch_size": row["batch"], "precision": "bf16"},
    }
    shape = load(settings, overrides, ("data",)).config.model.model_dump()
    tokens = _zipf(4 * row["batch"], shape["context"] + 1, chosen.vocabulary)
    data = streams(Arrays({"tokens": tokens}, vocabulary=chosen.vocabulary), None, 0.25, seed=0)
    device, built = jax.devices()[0], build_run(settings, overrides, data)
    state = built.strategy.abstract_state()  # type: ignore[attr-defined]
    needed, room = _bytes(state) + _bytes(state.params), (device.memory_stats() or {}).get("bytes_limit")
    if room is not None and needed > room:
        return {"error": f"does not fit: state and gradients are {needed / 2**30:.1f} GiB of {room / 2**30:.1f}"}
    started = time.perf_counter()
    run = step_case(built, [{"tokens": part} for part in np.split(tokens, 4)])
    compile_seconds = time.perf_counter() - started
    first_loss = run(1)[1]
    run(WARM_UP)
    timings = [run(STEPS) for _ in range(ROUNDS)]
    seconds, per_step = statistics.median(t[0] for t in timings), row["batch"] * shape["context"]
    flops = per_step * flops_per_token(shape, chosen.vocabulary) / seconds
    peak = peak_flops(device.device_kind, "bf16")
    return {
        "device": device.device_kind,
        "seconds": seconds,
        "round_seconds": [round(t[0], 6) for t in timings],
        "tokens_per_second": per_step / seconds,
        "flops_per_second": flops,
        "mfu": peak and flops / peak,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
        "losses": [first_loss, timings[-1][1]],
    }


def _bytes(abstract: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def flops_per_token(shape: dict[str, Any], vocabulary: int) -> int:
    """Model FLOPs of forward and backward (Chowdhery et al. 2022, appendix B): attention in full, no remat."""
    width, hidden, ratio = shape["width"], shape["mlp_width"], shape["kv_heads"] / shape["heads"]
    attention = width * width * (2 + 2 * ratio)
    mlp = width * hidden * (3 if shape["activation"] == "swiglu" else 2)
    products = shape["layers"] * (attention + mlp) + width * vocabulary
    return int(6 * products + 12 * shape["layers"] * shape["context"] * width)


def _zipf(rows: int, length: int, vocabulary: int) -> np.ndarray:
    """Tokens as unequal as words are: something to learn, so that the loss must fall."""
    ranks = np.random.default_rng(0).zipf(1.2, (rows, length))
    return (ranks % vocabulary).astype(np.int32)


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])))
