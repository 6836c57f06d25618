"""PyTorch's side: the training step as its users write it, on batches that are ready.

python torch_steps.py gpt|cnn eager|compiled
"""

import os
import sys
import time
from typing import Any

import cases
import torch
import torch.distributed
from contender import Case, claim_stdout, serve
from torch import Tensor, nn
from torch_models import build, build_optimizer
from torch_operations import operations


def own_rows(batch: dict[str, Any], rank: int, processes: int) -> dict[str, Tensor]:
    """This rank's part of a global batch, as the models above read it."""
    rows = len(next(iter(batch.values()))) // processes
    tensors = {name: torch.tensor(array[rank * rows : (rank + 1) * rows]) for name, array in batch.items()}
    if "tokens" in tensors:
        return {"tokens": tensors["tokens"].long()}
    return {"x": tensors["x"].permute(0, 3, 1, 2).contiguous(), "y": tensors["y"].long()}


def step_case(model: str, mode: str) -> Case:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    module = build(model)
    optimizer = build_optimizer(model, module)
    if processes > 1:
        torch.distributed.init_process_group("gloo")
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    called: Any = torch.compile(module) if mode == "compiled" else module
    ready = [own_rows(batch, rank, processes) for batch in cases.batches(model)]

    def run(steps: int) -> tuple[float, float]:
        started = time.perf_counter()
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = called(**ready[step % len(ready)])
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - started) / steps, loss.item()

    return run


def main() -> None:
    answers = claim_stdout()
    model, mode = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    known = {"step": step_case(model, mode)}
    if model == "gpt" and "RANK" not in os.environ:
        known |= operations()
    serve(answers, about, known)


if __name__ == "__main__":
    main()
