"""`jaxdist config list|show|validate|schema|diff`: look at configs; needs no jax."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from jaxdist.config.dotted import flatten
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.shipped import description, shipped_clusters, shipped_configs, shipped_studies


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser("config", help="list, show, check and compare configs")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the shipped configs, comparisons and clusters")
    for name, help_text in (
        ("show", "the resolved config, each value with where it came from"),
        ("validate", "every mistake at once; exit code 2 if there is one"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("config")
        action.add_argument("overrides", nargs="*", metavar="a.b=value")
    actions.add_parser("schema", help="JSON Schema, for editors")
    diff = actions.add_parser("diff", help="the values in which two configs differ; exit code 1 if any do")
    diff.add_argument("first")
    diff.add_argument("second")


def run(args: argparse.Namespace) -> int:
    match args.action:
        case "list":
            for command, shipped in (
                ("train", shipped_configs()),
                ("compare", shipped_studies()),
                ("compare SPEC --simulate", shipped_clusters()),
            ):
                print(f"jaxdist {command}:")
                width = max(map(len, shipped), default=0)
                for name, file in shipped.items():
                    print(f"  {name:<{width}}  {description(file)}")
        case "show":
            resolved = load(args.config, args.overrides)
            for text, path in _yaml_lines(resolved.config.model_dump(mode="json")):
                print(f"{text:<52}  # {origin_of(path, resolved.origins)}" if path else text)
        case "validate":
            load(args.config, args.overrides)
            print(f"{args.config}: valid")
        case "schema":
            print(json.dumps(Config.model_json_schema(), indent=2))
        case "diff":
            first, second = (flatten(load(c).config.model_dump(mode="json")) for c in (args.first, args.second))
            differing = [p for p in dict.fromkeys([*first, *second]) if first.get(p) != second.get(p)]
            for path in differing:
                print(f"{path}: {_shown(first, path)} -> {_shown(second, path)}")
            return 1 if differing else 0
    return 0


def _yaml_lines(block: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(line of YAML, dotted path of the value that it gives or "" for a block's first line)."""
    indent = "  " * (path.count(".") + 1 if path else 0)
    for key, value in block.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:", ""
            yield from _yaml_lines(value, here)
        else:
            yield f"{indent}{key}: {json.dumps(value)}", here  # JSON is YAML


def origin_of(path: str, origins: dict[str, str]) -> str:
    """Where a value came from: of the longest given path that leads to it."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return "default"


def _shown(values: dict[str, Any], path: str) -> str:
    return json.dumps(values[path]) if path in values else "(none)"
