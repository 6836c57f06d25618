"""PyTorch's ways to send fewer bytes, as their own documentation says to use them, and GRACE's where it is there."""

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

POWERSGD_RANK = {"ddp_powersgd_1": 1, "ddp_powersgd_4": 4}
SCHEMES = ("ddp_fp32", "ddp_fp16", *POWERSGD_RANK, "grace_topk")
TOP = 0.01  # part of the elements that GRACE sends
ONE_BUCKET = 100  # MB: with several, the PowerSGD hook hangs on Gloo

Reduce = Callable[[], None]


def distribute(scheme: str, module: nn.Module, steps: int) -> tuple[nn.Module, Reduce, int]:
    """(what to call, what to do after the backward pass, number of first steps that send fp32)."""
    if scheme == "grace_topk":
        return module, _grace(module), 0
    parallel = DistributedDataParallel(module, bucket_cap_mb=ONE_BUCKET, gradient_as_bucket_view=True)
    dense_steps = 0
    if scheme == "ddp_fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif scheme in POWERSGD_RANK:
        dense_steps = steps // 10  # what torch's documentation of start_powerSGD_iter suggests
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=POWERSGD_RANK[scheme],
            start_powerSGD_iter=max(2, dense_steps),
        )
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return parallel, lambda: None, dense_steps


def _grace(module: nn.Module) -> Reduce:
    """GRACE (Xu et al. 2021), top-k with a residual: every gradient by itself, all gathered.

    Raises ImportError where it is not installed.
    """
    from grace_dl.dist.communicator.allgather import Allgather
    from grace_dl.dist.compressor.topk import TopKCompressor
    from grace_dl.dist.memory.residual import ResidualMemory

    communicator = Allgather(TopKCompressor(TOP), ResidualMemory(), dist.get_world_size())
    for parameter in module.parameters():
        dist.broadcast(parameter.data, 0)

    def reduce() -> None:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            parameter.grad = communicator.step(parameter.grad, name).reshape(parameter.shape)

    return reduce
