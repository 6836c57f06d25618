"""jaxdist on one GPU: tokens a second and memory of GPT-2 124M and of a stack of Llama 3 8B's layers.

Each row is a process of its own, so that its peak memory is its own; one that does not fit says so and the
sweep goes on. Started without arguments by run.py --gpu; as a child it is given the row as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import time
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
VOCABULARY = {"gpt2": 50_257, "llama": 32_000}  # Llama 3's own 128,256 would outweigh so few layers

Row = dict[str, Any]


def _rows(batches: list[int], remats: list[str], loss_chunk: int) -> list[Row]:
    """Every combination, but XLA's attention at the smallest batch only: its T x T numbers soon fill the memory."""
    return [
        {"batch": batch, "attention": attention, "scan_layers": scan, "remat": remat, "loss_chunk": loss_chunk}
        for batch in batches
        for remat in remats
        for attention in (("cudnn", "xla") if batch == min(batches) else ("cudnn",))
        for scan in (False, True)
    ]


SWEEPS: dict[str, tuple[str, dict[str, Any], list[Row]]] = {
    "gpt2": ("GPT-2 124M, bf16, context 1024", GPT2, _rows([16, 32, 64], ["none"], 4096)),
    "llama": (
        f"Llama 3 8B's shape, {LLAMA_LAYERS} of 32 layers, vocabulary {VOCABULARY['llama']:,}, bf16, context 4096",
        LLAMA,
        _rows([2, 4], ["dots", "full"], 2048),
    ),
}
STEPS, WARM_UP, ROUNDS = 10, 3, 3
TIME_LIMIT = 900  # seconds of one row, compilation included


def sweep(name: str, overrides: list[str]) -> str:
    """Every row of one model; a Markdown section with the best one named."""
    title, _, rows = SWEEPS[name]
    log(f"\n## {title}")
    cells, best = [], None
    for row in rows:
        answer = _measure(name, row, overrides)
        log(f"  {json.dumps(row)} -> {json.dumps(answer)}")
        cells.append([str(row[key]) for key in ("batch", "attention", "scan_layers", "remat")] + _shown(answer))
        if "tokens_per_second" in answer and (best is None or answer["tokens_per_second"] > best[0]):
            best = (answer["tokens_per_second"], row)
    header = ["micro-batch", "attention", "scanned", "remat", "tokens/s", "ms a step", "TFLOP/s (of peak)",
              "peak memory, GiB", "compile, s", "loss"]  # fmt: skip
    end = f"Best: {best[0]:,.0f} tokens/s with {best[1]}." if best else "No row ran."
    return f"## {title}\n\n{table(header, cells)}\n\n{end}"


def _shown(answer: Row) -> list[str]:
    if "error" in answer:
        return [answer["error"], *[""] * 5]
    share = "unknown" if answer["mfu"] is None else f"{100 * answer['mfu']:.1f} %"
    memory = "not told" if answer["peak_bytes"] is None else f"{answer['peak_bytes'] / 2**30:.1f}"
    return [
        f"{answer['tokens_per_second']:,.0f}", f"{answer['seconds'] * 1e3:.1f}",
        f"{answer['flops_per_second'] / 1e12:.1f} ({share})", memory,
        f"{answer['compile_seconds']:.0f}", f"{answer['losses'][0]:.3f} to {answer['losses'][1]:.3f}",
    ]  # fmt: skip


def _measure(name: str, row: Row, overrides: list[str]) -> Row:
    command = [sys.executable, __file__, name, json.dumps(row), *overrides]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"over {TIME_LIMIT} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "RESOURCE_EXHAUSTED" in done.stderr:
        return {"error": "does not fit"}
    log(done.stderr[-3000:])
    return {"error": f"failed, code {done.returncode}"}


def _child(name: str, row: Row, overrides: list[str]) -> Row:
    """Build the row's run, train a few steps and say how fast they were."""
    import jax
    from jaxdist_steps import build_run, step_case

    from jaxdist.data.arrays import Arrays
    from jaxdist.data.build import streams
    from jaxdist.telemetry.peak import peak_flops

    settings = {
        "name": name,
        "model": {"kind": "transformer", **SWEEPS[name][1], **{k: v for k, v in row.items() if k != "batch"}},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1},
        "train": {"global_batch_size": row["batch"], "precision": "bf16"},
    }
    shape = load(settings, overrides, ("data",)).config.model.model_dump()
    tokens = _zipf(4 * row["batch"], shape["context"] + 1, VOCABULARY[name])
    data = streams(Arrays({"tokens": tokens}, vocabulary=VOCABULARY[name]), None, 0.25, seed=0)
    started = time.perf_counter()
    run = step_case(build_run(settings, overrides, data), [{"tokens": part} for part in np.split(tokens, 4)])
    compile_seconds = time.perf_counter() - started
    first_loss = run(1)[1]
    run(WARM_UP)
    timings = [run(STEPS) for _ in range(ROUNDS)]
    seconds, per_step = statistics.median(t[0] for t in timings), row["batch"] * shape["context"]
    flops = per_step * flops_per_token(shape, VOCABULARY[name]) / seconds
    device = jax.devices()[0]
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
