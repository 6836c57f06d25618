"""`jaxdist data`: prepare and look at data."""

import argparse
from pathlib import Path

from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.build import Data, build_data
from jaxdist.data.inspect import inspect_data, inspect_tokens
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


def _is_token_file(path: Path) -> bool:
    if path.suffix == ".bin":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
