"""One run of PyTorch: four Gloo processes on the batches, the schedule and the evaluation of a jaxdist config.

    unshare -n sh -c 'ip link set lo up && python torch_run.py SPEC SCHEME SEED OUTPUT.json'

The network namespace is its own, so that what its loopback counts is this run's alone.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from counters import loopback
from torch import Tensor, nn
from torch_schemes import SCHEMES, distribute

from jaxdist.batch_sizes import batch_sizes
from jaxdist.config.schema import Config
from jaxdist.config.study import load_study
from jaxdist.data.build import Data, build_data
from jaxdist.study.plan import Case, Planner

sys.path.insert(0, str(Path(__file__).parents[1] / "single"))
import torch_models

WORKERS = 4
NOT_TIMED = 10  # first steps
EVAL_BATCH = 500


class MLP(nn.Module):
    """The mean loss of x [B, features] with labels y [B]."""

    def __init__(self, features: int, hidden: list[int], classes: int):
        super().__init__()
        widths = [features, *hidden]
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.hidden:
            x = nn.functional.relu(layer(x))
        return nn.functional.cross_entropy(self.out(x), y)


def config_of(spec: Path, seed: int) -> Config:
    """The config of the spec's baseline."""
    study, _ = load_study(spec)
    return (
        Planner(study, spec, Path("runs")).job(Case(None, study.against), f"{study.against}/seed-{seed}", seed).config
    )


def build_model(config: Config, data: Data) -> nn.Module:
    """The same layers as jaxdist's, drawn from the same distributions."""
    torch.manual_seed(config.seed)
    block: Any = config.model
    info = data.info
    if block.kind == "transformer":
        assert info.vocabulary is not None
        model: nn.Module = torch_models.GPT(info.vocabulary, block.layers, block.width, block.heads, block.context)
        nn.init.normal_(model.position_embedding.weight, std=0.01)
        return model
    assert info.classes is not None
    if block.kind == "cnn":
        model = torch_models.CNN(block.channels, block.hidden, info.classes)
    else:
        model = MLP(info.features["x"].shape[0], block.hidden, info.classes)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # Flax's lecun_normal: cut off at two standard deviations, of variance 1 / inputs
            scale = 1 / (parameter[0].numel() ** 0.5 * 0.87962566)
            nn.init.trunc_normal_(parameter, std=scale, a=-2 * scale, b=2 * scale)
        else:
            nn.init.zeros_(parameter)
    return model


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Matrices, convolutions and embeddings decay, as in jaxdist; the learning rate is set at each step."""
    block: Any = config.optimizer
    parameters = list(model.parameters())
    if block.kind == "momentum":
        assert not block.weight_decay
        return torch.optim.SGD(parameters, lr=0.0, momentum=block.momentum)
    assert block.kind == "adamw"
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": block.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(block.b1, block.b2), eps=block.eps)


def tensors(rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
    if "tokens" in rows:
        return {"tokens": torch.from_numpy(rows["tokens"].astype(np.int64))}
    x = torch.from_numpy(rows["x"])
    if x.dtype == torch.uint8:
        x = x.permute(0, 3, 1, 2).contiguous().float() / 255
    return {"x": x, "y": torch.from_numpy(rows["y"]).long()}


def evaluate(model: nn.Module, data: Data, num_samples: int | None) -> dict[str, float]:
    """Mean loss over the validation samples that jaxdist evaluates, and accuracy where there are labels."""
    logits: list[Tensor] = []
    if hasattr(model, "out"):
        model.out.register_forward_hook(lambda module, inputs, output: logits.append(output))
    count = min(num_samples or len(data.validation), len(data.validation))
    loss = correct = 0.0
    with torch.no_grad():
        for start in range(0, count, EVAL_BATCH):
            size = min(EVAL_BATCH, count - start)
            batch = tensors(data.validation.padded(start, size, size))
            loss += model(**batch).item() * size
            if logits:
                correct += (logits.pop().argmax(-1) == batch["y"]).sum().item()
    return {"eval.loss": loss / count} | ({"eval.accuracy": correct / count} if hasattr(model, "out") else {})


def train(rank: int, config: Config, scheme: str, rates: list[float], output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    data = build_data(config.data, config.seed, getattr(config.model, "context", None))
    model, steps, batch = build_model(config, data), len(rates), config.train.global_batch_size
    optimizer = build_optimizer(config, model)
    called, reduce, dense_steps = distribute(scheme, model, steps)
    rows = np.arange(batch).reshape(WORKERS, -1)[rank]
    counts, losses, started = {}, [], 0.0
    for step, rate in enumerate(rates):
        if step in (0, dense_steps):
            dist.barrier()
            counts[step] = loopback()
        if step == NOT_TIMED:
            started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = called(**tensors(data.train.rows(step * batch + rows)))
        loss.backward()
        reduce()
        optimizer.step()
        if step % config.telemetry.log_every == 0:
            losses.append(loss.item())
    seconds = (time.perf_counter() - started) / (steps - NOT_TIMED)
    dist.barrier()
    end = loopback()
    if rank == 0:
        found: dict[str, Any] = {
            "scheme": scheme,
            "seed": config.seed,
            "steps": steps,
            "dense_steps": dense_steps,
            **evaluate(model, data, config.train.eval_samples),
            "seconds_a_step": seconds,
            # On a loopback what one process sends is what another receives: each byte is in both counters once.
            "sent_a_step": end.since(counts[0]).sent / WORKERS / steps,
            "sent_a_compressed_step": end.since(counts[dense_steps]).sent / WORKERS / (steps - dense_steps),
            "losses_of_rank_0": losses,
            "torch": torch.__version__,
        }
        output.write_text(json.dumps(found, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("seed", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, help="only so many, to try it")
    args = parser.parse_args()
    config = config_of(args.spec, args.seed)
    rates = learning_rates(config, args.steps)
    torch.multiprocessing.spawn(train, (config, args.scheme, rates, args.output), nprocs=WORKERS)


def learning_rates(config: Config, steps: int | None) -> list[float]:
    """Of each step of the budget: jaxdist's own schedule. JAX is loaded here, not in the processes that train."""
    import jax

    from jaxdist.optimizer import learning_rate_schedule

    total = config.train.budget.steps
    if total is None:
        epochs, data = config.train.budget.epochs, build_data(config.data, config.seed)
        assert epochs is not None
        total = batch_sizes(config.train).steps_for(epochs * len(data.train))
    schedule = learning_rate_schedule(config.optimizer.learning_rate, total)
    return np.asarray(jax.vmap(schedule)(np.arange(total)), np.float64).tolist()[:steps]


if __name__ == "__main__":
    main()
