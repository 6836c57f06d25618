"""`jaxdist generate RUN --prompt TEXT`: text from a trained language model."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser("generate", help="text from a trained language model")
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="such as data.files=...")
    parser.add_argument("--prompt", required=True, help="what the text starts with")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token (0.8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or the path of a tokenizer.json")


def run(args: argparse.Namespace) -> int:
    from jaxdist.runtime.topology import is_first
    from jaxdist.trained import generate_text

    text = generate_text(
        args.run,
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        seed=args.seed,
        step=args.step,
        tokenizer=args.tokenizer,
        overrides=args.overrides,
    )
    if is_first():
        print(args.prompt + text)
    return 0
