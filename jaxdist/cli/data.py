"""`jaxdist data`: prepare and look at data."""

import argparse
from pathlib import Path

import numpy as np

from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.build import Data, build_data
from jaxdist.data.inspect import inspect_data, inspect_tokens
from jaxdist.data.partition.attach import attach
from jaxdist.data.partition.build import labels_of
from jaxdist.data.partition.describe import describe, label_counts
from jaxdist.data.partition.describe import lines as describe_lines
from jaxdist.data.partition.manifest import digest, save
from jaxdist.data.partition.picture import picture
from jaxdist.data.tokenize import tokenize
from jaxdist.data.tokens import MAGIC
from jaxdist.runtime.exit_codes import DONE


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("data", help="prepare and look at data")
    commands = parser.add_subparsers(dest="data_command", required=True)
    make = commands.add_parser("tokenize", help="make a token file (.bin) from text files")
    make.add_argument("files", nargs="+", help="text files or quoted globs (** descends)")
    make.add_argument("-o", "--output", type=Path, required=True, help="the .bin file to write")
    make.add_argument("--tokenizer", default="bytes", help="bytes, or a Hugging Face tokenizer.json")
    make.add_argument("--separator", type=int, metavar="ID", help="token id written after every file")
    look = commands.add_parser("inspect", help="what a config's data or a .bin file holds")
    look.add_argument("config_or_file", help="a config, the name of a shipped one, or a .bin file")
    look.add_argument("overrides", nargs="*", metavar="a.b=value", help="changes to the config")
    divide = commands.add_parser("partition", help="which client gets which samples, and how unlike they are")
    divide.add_argument("config", help="a config with data.partition, or the name of a shipped one")
    divide.add_argument("overrides", nargs="*", metavar="a.b=value", help="changes to the config")
    divide.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="the manifest to write")
    divide.add_argument("--picture", type=Path, metavar="FILE.svg", help="the picture to write: a bar a client")


def run(args: argparse.Namespace) -> int:
    """Run the chosen command.

    Raises:
      UserError: when files are missing or damaged.
    """
    if args.data_command == "tokenize":
        header = tokenize(args.files, args.output, args.tokenizer, args.separator)
        print(
            f"{args.output}: {header.count:,} tokens of {header.dtype}, vocabulary {header.vocabulary:,}, "
            f"tokenizer {header.tokenizer}"
        )
    elif args.data_command == "partition":
        say(_partition(args))
    elif _is_token_file(Path(args.config_or_file)):
        if args.overrides:
            raise UserError(f"{args.overrides[0]} changes a config, and {args.config_or_file} is a token file")
        print("\n".join(inspect_tokens(Path(args.config_or_file))))
    else:
        print("\n".join(inspect_data(_data_of_config(args.config_or_file, args.overrides))))
    return DONE


def _data_of_config(source: str, overrides: list[str]) -> Data:
    config = load(source, overrides).config
    return build_data(config.data, config.seed, getattr(config.model, "context", None))


def _partition(args: argparse.Namespace) -> list[str]:
    config = load(args.config, args.overrides).config
    block = config.data.partition
    if block is None:
        raise UserError(f"{args.config} has no data.partition; give one, such as data.partition.clients=10")
    if block.manifest is not None and args.output is not None:
        raise UserError(f"-o: has no effect with data.partition.manifest, {block.manifest}, which is one already")
    if args.picture is not None and args.picture.suffix != ".svg":
        raise UserError(f"--picture: {args.picture} is to end in .svg, the only kind that is drawn")
    undivided = config.data.model_copy(update={"partition": None})
    train = build_data(undivided, config.seed, getattr(config.model, "context", None)).train
    _, partition = attach(train, block, config.seed)
    ids = train.subset.ids(np.arange(len(train), dtype=np.int64))
    labels = labels_of(train.source, partition.ids)
    kept = 0 if partition.validation is None else len(partition.validation.ids)
    lines = [
        f"{'clients':<12}{partition.num_clients:,}",
        f"{'samples':<12}{len(partition.ids):,} for training, {kept:,} for the clients' validation, "
        f"{len(ids) - len(partition.ids) - kept:,} of nobody",
        *describe_lines(describe(partition, labels)),
    ]
    if args.output is not None:
        save(args.output, partition, block, config.seed, train.source, ids)
        lines.append(f"{'manifest':<12}{args.output}, SHA-256 of the ids {digest(partition)[:16]}")
    if args.picture is not None:
        counts = partition.sizes[:, None] if labels is None else label_counts(partition, labels)
        title = f"{config.name}: {block.words()}"
        try:
            args.picture.write_text(picture(counts, partition.names, title))
        except OSError as error:
            raise UserError(f"--picture: cannot write {args.picture}: {error.strerror}") from error
        lines.append(f"{'picture':<12}{args.picture}")
    return lines


def _is_token_file(path: Path) -> bool:
    if path.suffix == ".bin":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
