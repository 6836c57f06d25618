"""The step as it is lowered for a GPU, on a machine that has none: StableHLO, before XLA's own passes.

What XLA makes of it for an H100 shows benchmarks/single/ahead_of_time.py, where the CUDA compiler is installed.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxdist.config.load import load
from jaxdist.data.arrays import Arrays
from jaxdist.data.build import streams
from jaxdist.models import attention, linear
from jaxdist.run import build
from jaxdist.sync.loop import VOTES

B, T, V, L, K = 8, 64, 100, 2, 16  # samples, tokens, vocabulary, layers, features of a head
GPT = {"layers": L, "width": 8 * K, "heads": 8, "context": T}
LLAMA = {
    **GPT, "kv_heads": 4, "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False,
    "tied_embedding": False,
}  # fmt: skip
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: Any) -> None:
    """What models ask the mesh for, as its devices are CPUs; and jax asks the installed cuDNN for its version."""
    for module in (attention, linear):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(model: dict[str, Any], mesh: dict[str, int], compression: dict[str, Any] | None = None) -> str:
    """StableHLO of the bf16 step for CUDA."""
    settings = {
        "name": "lowered",
        "model": {"kind": "transformer", "pad_vocabulary": 8, **model},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "train": {"global_batch_size": B, "precision": "bf16"},
        "strategy": {"kind": "sync", "mesh": mesh},
        "gradient_compression": compression or {},
    }
    data = streams(Arrays({"tokens": np.zeros((2 * B, T + 1), np.int32)}, vocabulary=V), None, 0.5, seed=0)
    strategy: Any = build(load(settings, [], ("data",)).config, data=data).strategy
    workers = mesh.get("data", 1) * mesh.get("fsdp", 1)
    votes = jax.ShapeDtypeStruct((workers, len(VOTES)), jnp.float32)
    traced = jax.jit(strategy.functions.step).trace(strategy.abstract_state(), strategy.abstract_batch(), votes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def shapes_of_queries(program: str, target: str) -> list[list[int]]:
    calls = re.findall(rf"@{re.escape(target)}\(.*?\) .*? : \(tensor<([\dx]+)xbf16>", program)
    return [[int(size) for size in shape.split("x")] for shape in calls]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_device_attends_with_cudnn_in_both_passes_with_its_own_samples_and_heads(mesh: dict[str, int]) -> None:
    program, tensor = lowered(LLAMA, mesh), mesh.get("tensor", 1)
    own = [B * tensor // 8, T, LLAMA["heads"] // tensor, K]
    assert shapes_of_queries(program, "__cudnn$fmhaSoftmax") == L * [own]
    assert shapes_of_queries(program, "__cudnn$fmhaSoftmaxBackward") == L * [own]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_remat_full_attends_twice_forward_and_once_backward(scan: bool) -> None:
    program = lowered({**GPT, "scan_layers": scan, "remat": "full"}, {"fsdp": 8})
    in_text = 1 if scan else L
    assert len(shapes_of_queries(program, "__cudnn$fmhaSoftmax")) == 2 * in_text
    assert len(shapes_of_queries(program, "__cudnn$fmhaSoftmaxBackward")) == in_text


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_every_matrix_product_of_a_bf16_step_multiplies_bf16(model: dict[str, Any]) -> None:
    """One parameter that is not cast makes float32 of all activations after it, and then of every product."""
    program = lowered(model, {"data": 8})
    operands = re.findall(r"stablehlo\.dot_general .*? : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    assert operands
    assert set(operands) == {("bf16", "bf16")}


@pytest.mark.parametrize("up", ["int8", "int4", "sign", "topk", "powersgd"])
def test_compressed_gradients_are_lowered_for_a_gpu_with_the_payloads_dtype(up: str) -> None:
    """Over `data`, beside sharded and split parameters: all that is exchanged but by sums are bytes or half-words."""
    program = lowered(GPT, {"data": 2, "fsdp": 2, "tensor": 2}, {"up": {"kind": up}})
    exchanged = re.findall(r'"stablehlo\.(all_to_all|all_gather)".* : \(tensor<(?:\d+x)*(\w+)>\)', program)
    over_data = [(op, dtype) for op, dtype in exchanged if dtype.startswith("ui")]
    assert {dtype for _, dtype in over_data} == {"powersgd": set(), "topk": {"ui16"}}.get(up, {"ui8"})
    assert len(over_data) == {"powersgd": 0, "topk": 1}.get(up, 2)
