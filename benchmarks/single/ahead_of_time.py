"""The step of shipped configs, compiled for H100s on a machine that has none: memory, and what overlaps with what.

XLA compiles for a described GPU with the real compiler and the real schedule. What it cannot know without one:
times, which kernel its autotuning takes for a matrix product, and the scratch memory of cuDNN's attention.

    pip install '.[cuda12]'
    python benchmarks/single/ahead_of_time.py [--only gpt2 llama-fsdp8] [--hlo DIRECTORY] [--markdown FILE]
"""

import argparse
import datetime
import os
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin then compiles without a GPU; asked for one, it would not load

import numpy as np
from jax.experimental import topologies
from page import describe_machine, log, table

from jaxdist.config.load import load
from jaxdist.data.arrays import Arrays
from jaxdist.data.build import streams
from jaxdist.models.build import build_task
from jaxdist.runtime.topology import Topology
from jaxdist.sync.strategy import SyncStrategy, build
from jaxdist.telemetry.hlo import Instruction, Module, parse_hlo
from jaxdist.telemetry.wire import Collective, collectives_of, wire_bytes

# NVIDIA H100 SXM5 80 GB as XLA describes a device (xla/stream_executor/device_description.proto), CUDA 12.9.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
VOCABULARY = {"gpt2_124m": 50_257, "llama3_8b": 128_256}
PRODUCTS = ("__cublas", "__cudnn")  # custom calls that multiply matrices; what XLA compiles itself has a `dot`


@dataclass(frozen=True)
class Case:
    title: str
    config: str  # a key of VOCABULARY
    hosts: int  # of GPUs that NVLink joins
    gpus: int  # of each host
    overrides: tuple[str, ...] = ()


def _llama_on_one_host(fsdp: int, tensor: int) -> tuple[str, ...]:
    """Of 4.2 million tokens an update two microbatches, each worker with one sample of 8192 tokens."""
    mesh = (f"strategy.mesh.fsdp={fsdp}", f"strategy.mesh.tensor={tensor}", "train.accumulation_steps=2")
    return (*mesh, f"train.global_batch_size={2 * fsdp}")


ONE_GPU = ("train.global_batch_size=32", "train.accumulation_steps=1")
CASES = {
    "gpt2": Case("GPT-2 124M, one GPU, 32 samples", "gpt2_124m", 1, 1, ONE_GPU),
    "gpt2-scan": Case("the same, scanned", "gpt2_124m", 1, 1, (*ONE_GPU, "model.scan_layers=true")),
    "gpt2-data8": Case(
        "GPT-2 124M, data 8, 32 samples each", "gpt2_124m", 1, 8,
        ("train.global_batch_size=256", "train.accumulation_steps=1"),
    ),
    "llama-fsdp8": Case("Llama 3 8B, fsdp 8", "llama3_8b", 1, 8, _llama_on_one_host(8, 1)),
    "llama-tensor2": Case("Llama 3 8B, fsdp 4 x tensor 2", "llama3_8b", 1, 8, _llama_on_one_host(4, 2)),
    "llama-shipped": Case("Llama 3 8B, data 4 x fsdp 4 x tensor 2, as shipped", "llama3_8b", 4, 8),
}  # fmt: skip


def compile_case(case: Case) -> tuple[SyncStrategy, Any, float]:
    """(strategy, the compiled step, seconds of compilation)."""
    try:
        target = {"target_config": H100, "topology": f"1x{case.hosts}x{case.gpus}"}
        devices = topologies.get_topology_desc(platform="cuda", **target).devices
    except NotImplementedError as error:
        raise SystemExit(f"{error}: pip install '.[cuda12]' brings the compiler") from None
    config = load(case.config, case.overrides, ("data",)).config
    vocabulary = VOCABULARY[case.config]
    tokens = np.zeros((8, config.model.context + 1), np.int32)  # type: ignore[union-attr]
    data = streams(Arrays({"tokens": tokens}, vocabulary=vocabulary), None, 0.25, seed=0)
    strategy = build(config, Topology(1, 0, list(devices)), build_task(config.model, data.info), data)
    lowered, started = strategy.lower(), time.perf_counter()
    return strategy, lowered.compile(), time.perf_counter() - started


def covered(module: Module) -> dict[str, bool]:
    """Of each collective by name: whether matrices are multiplied between its start and its end, as scheduled.

    The instructions of a compiled computation are in the order in which they are issued.
    """
    found = {}
    for instructions in module.computations.values():
        products = 0
        open_since: dict[str, int] = {}
        for instruction in instructions.values():
            products += _multiplies(module, instruction)
            if instruction.op.endswith("-start"):
                open_since[instruction.name] = products
            for started in set(instruction.operands) & open_since.keys():
                found[started] = products > open_since.pop(started)
    return found


def _multiplies(module: Module, instruction: Instruction) -> bool:
    if instruction.op == "dot" or any(target in instruction.attributes for target in PRODUCTS):
        return True
    return any(_multiplies(module, inner) for inner in _called(module, instruction))


def _called(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    for _, name in instruction.called:
        yield from module.computations.get(name, {}).values()


def dots(module: Module) -> Counter[str]:
    """How many matrix products the program text has, by the dtypes of their operands."""
    found: Counter[str] = Counter()
    for instructions in module.computations.values():
        for dot in instructions.values():
            if dot.op == "dot":
                found[" x ".join(instructions[name].type.partition("[")[0] for name in dot.operands)] += 1
    return found


def sent(collectives: list[Collective], overlapped: dict[str, bool]) -> str:
    """A table of what one GPU sends in a step, by collective, axis and dtype."""
    groups: dict[tuple[str, str, str], list[Collective]] = defaultdict(list)
    for collective in collectives:
        groups[collective.op, collective.axis, collective.dtype].append(collective)
    rows = []
    for key, members in sorted(groups.items()):
        by_name = [(c.name, c.trip_count * wire_bytes(c)) for c in members]
        total = sum(size for _, size in by_name)
        under = sum(size for name, size in by_name if overlapped.get(name))
        rows.append([*key, str(len(members)), str(sum(c.trip_count for c in members)),
                     f"{total / 1e9:.3g}", f"{100 * under / total:.0f} %"])  # fmt: skip
    header = ["collective", "axis", "dtype", "instructions", "runs a step", "GB sent by a GPU", "under a product"]
    return table(header, rows) if rows else "Nothing is sent."


def report(name: str, case: Case, hlo: Path | None) -> str:
    """A Markdown section: compilation, memory, attention, matrix products, collectives."""
    strategy, compiled, seconds = compile_case(case)
    text = compiled.as_text()
    if hlo is not None:
        (hlo / f"{name}.hlo").write_text(text)
    module, memory = parse_hlo(text), compiled.memory_analysis()
    attentions = {what: text.count(f'custom_call_target="__cudnn$fmhaSoftmax{end}"')
                  for what, end in (("forward", ""), ("backward", "Backward"))}  # fmt: skip
    lines = [
        f"Compiled in {seconds:.1f} s. On each GPU {memory.argument_size_in_bytes / 1e9:.2f} GB of state and batch "
        f"and {memory.temp_size_in_bytes / 1e9:.2f} GB temporary.",
        f"cuDNN attention calls in the text: {attentions}. Matrix products by operands: {dict(dots(module))}.",
    ]
    log(f"\n## {case.title}\n" + "\n".join(lines))
    what = sent(collectives_of(text, strategy.mesh), covered(module))
    log(what)
    shown = " ".join(case.overrides) or "no overrides"
    return f"## {case.title}\n\n`{case.config}`, {shown}.\n\n" + "\n\n".join([*lines, what])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--hlo", type=Path, metavar="DIRECTORY", help="keep the compiled programs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as a page")
    args = parser.parse_args()
    log(machine := describe_machine(gpu=False))
    if args.hlo is not None:
        args.hlo.mkdir(parents=True, exist_ok=True)
    sections = [report(name, CASES[name], args.hlo) for name in args.only]
    if args.markdown:
        title = f"# Compiled ahead of time for H100, {datetime.datetime.now(datetime.UTC).date().isoformat()}"
        command = shlex.join(["python", "benchmarks/single/ahead_of_time.py", *sys.argv[1:]])
        args.markdown.write_text("\n\n".join([title, f"`{command}` on {machine}.", *sections]) + "\n")


if __name__ == "__main__":
    main()
