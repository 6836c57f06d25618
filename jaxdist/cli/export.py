"""`jaxdist export RUN --to safetensors|stablehlo -o DIR`: a trained model for other programs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdist.config.errors import UserError
from jaxdist.config.model import Transformer
from jaxdist.runtime.exit_codes import DONE

if TYPE_CHECKING:
    from jaxdist.run import Built


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("export", help="a trained model for transformers, or as StableHLO")
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="such as data.files=...")
    parser.add_argument(
        "--to",
        required=True,
        choices=("safetensors", "stablehlo"),
        help="what transformers' GPT-2 and Llama load; or a program that needs jax but not jaxdist",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--batch", type=int, help="stablehlo: samples of a call; any number by default")


def run(args: argparse.Namespace) -> int:
    """Raises UserError if the run cannot be used, or the model cannot be put in this form."""
    from jaxdist.pretrained.directory import check_is_free
    from jaxdist.trained import build_run

    if args.batch is not None and args.to != "stablehlo":
        raise UserError(f"--batch: has no effect with --to {args.to}, only with --to stablehlo; leave it out")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch: {args.batch} must be at least 1")
    check_is_free(args.output)
    built = build_run(args.run, args.overrides)
    if built.topology.num_processes > 1:
        raise UserError("export: works in one process; unset JAXDIST_COORDINATOR and what belongs to it")
    write = _to_safetensors if args.to == "safetensors" else _to_stablehlo
    print(f"{args.output}: {write(args, built)}")
    return DONE


def _to_safetensors(args: argparse.Namespace, built: "Built") -> str:
    from jaxdist.pretrained import check_expressible, write_pretrained
    from jaxdist.trained import read_parameters

    model, vocabulary = built.config.model, built.data.info.vocabulary
    if not isinstance(model, Transformer) or vocabulary is None:
        raise UserError(
            f"model.kind: {getattr(model, 'kind', 'target')} has no class in transformers that is written here, "
            "only transformer has; --to stablehlo takes every model"
        )
    values = model.model_dump()
    check_expressible(values)
    params, _ = read_parameters(args.run, built, args.step)
    name = write_pretrained(params, values, vocabulary, args.output)
    return f"transformers.{name}.from_pretrained loads it"


def _to_stablehlo(args: argparse.Namespace, built: "Built") -> str:
    from jaxdist.export import RUNNER, export_stablehlo
    from jaxdist.trained import build_run, read_parameters

    if getattr(built.config.model, "attention", None) == "cudnn":  # a call of cuDNN is no part of StableHLO
        built = build_run(args.run, [*args.overrides, "model.attention=xla"])
    params, model_state = read_parameters(args.run, built, args.step)
    export_stablehlo(built.task, params, model_state, _inputs(built), args.output, batch=args.batch)
    return f"python {args.output / RUNNER} inputs.npz outputs.npy runs it"


def _inputs(built: "Built") -> dict[str, tuple[tuple[int, ...], Any]]:
    """A sample's fields as `predict` takes them: tokens without the last, which is only a target, as one segment."""
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (feature.shape, feature.dtype)
        for name, feature in built.data.info.features.items()
        if name != "segment_ids"
    }
    context = getattr(built.config.model, "context", None)
    if context is not None and "tokens" in fields:
        fields["tokens"] = ((context,), "int32")
    return fields
