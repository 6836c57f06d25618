"""The operations of a GPT step in PyTorch, each forward and backward on its own: what `--profile` times."""

import time
from collections.abc import Callable
from typing import Any

import cases
import torch
import torch.nn.functional as F
from contender import Case
from torch import Tensor
from torch_models import Block, build, build_optimizer


def operations() -> dict[str, Case]:
    """By the names of jaxdist_operations.operations, on arrays of the same shapes."""
    B, T, D, H = cases.BATCH["gpt"], cases.GPT["context"], cases.GPT["width"], cases.GPT["heads"]
    V, tokens = cases.VOCABULARY, B * T
    ids = torch.randint(V, (tokens,))

    def attention(query_BxTxHxK: Tensor, key_BxTxHxK: Tensor, value_BxTxHxK: Tensor) -> Tensor:
        swapped = (x.transpose(1, 2) for x in (query_BxTxHxK, key_BxTxHxK, value_BxTxHxK))
        return F.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)

    head = (B, T, H, D // H)
    return {
        "linear-256-768": _gradient(F.linear, (tokens, D), (3 * D, D), (3 * D,)),
        "linear-256-256": _gradient(F.linear, (tokens, D), (D, D), (D,)),
        "linear-256-1024": _gradient(F.linear, (tokens, D), (4 * D, D), (4 * D,)),
        "linear-1024-256": _gradient(F.linear, (tokens, 4 * D), (D, 4 * D), (D,)),
        "attention": _gradient(attention, head, head, head),
        "layer-norm": _gradient(lambda x, scale, bias: F.layer_norm(x, (D,), scale, bias), (tokens, D), (D,), (D,)),
        "gelu": _gradient(lambda x: F.gelu(x, approximate="tanh"), (tokens, 4 * D)),
        "head-and-loss": _gradient(lambda x, w: F.cross_entropy(F.linear(x, w), ids), (tokens, D), (V, D)),
        "embedding": _gradient(lambda w: F.embedding(ids, w), (V, D)),
        "block": block(B, T, D, H),
        "adamw": adamw(),
    }


def block(B: int, T: int, D: int, H: int) -> Case:
    module = Block(D, H)
    inputs, cotangent = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    leaves = [inputs, *module.parameters()]

    def run(steps: int) -> tuple[float, float]:
        started = time.perf_counter()
        for _ in range(steps):
            torch.autograd.grad(module(inputs), leaves, cotangent)
        return (time.perf_counter() - started) / steps, 0.0

    return run


def adamw() -> Case:
    """Over the GPT's own parameters."""
    module = build("gpt")
    optimizer = build_optimizer("gpt", module)
    for parameter in module.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def run(steps: int) -> tuple[float, float]:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        return (time.perf_counter() - started) / steps, 0.0

    return run


def _gradient(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Case:
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    cotangent = torch.randn_like(function(*inputs))

    def run(steps: int) -> tuple[float, float]:
        started = time.perf_counter()
        for _ in range(steps):
            torch.autograd.grad(function(*inputs), inputs, cotangent)
        return (time.perf_counter() - started) / steps, 0.0

    return run
