"""From files, `base:` and `a.b=v` overrides to one checked config, and where each value came from."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxdist.config.errors import ConfigError
from jaxdist.config.explain_errors import problems_of
from jaxdist.config.schema import Config
from jaxdist.config.shipped import shipped_configs
from jaxdist.config.target import CALLER
from jaxdist.config.yaml_file import parse_yaml, read_yaml

Layer = tuple[str, dict[str, Any]]  # where it is from, values
ONE_OF = {("train", "budget")}  # blocks whose fields exclude each other: a later layer replaces the whole


@dataclass(frozen=True)
class Resolved:
    """A checked config and, for each dotted path that was given, the file or override that gave it."""

    config: Config
    origins: dict[str, str]


def load(
    source: str | Path | dict[str, Any] | Config,
    overrides: tuple[str, ...] | list[str] = (),
    given: tuple[str, ...] = (),
) -> Resolved:
    """Resolve a config: a file, the name of a shipped one, a dictionary, or a Config.

    Later layers win: `base:` first, the file on top, then `a.b=v` overrides in the order given. `given` names
    blocks (model, data) that the caller brings as objects: they may be left out and are recorded as such.

    Raises:
      ConfigError: with every problem found, each with path, value, what is allowed, and a hint.
    """
    if isinstance(source, Config):
        layers, name = [("given", source.model_dump(exclude_unset=True))], "config"
    elif isinstance(source, dict):
        layers, name = [*base_layers(source, Path.cwd(), [], "config"), ("given", _without_base(source))], "config"
    else:
        layers, name = _file_layers(find_config(source), []), str(source)
        if Path(source).is_dir():  # a run directory, wherever it has been moved
            layers.append((str(source), {"run": {"dir": str(source)}}))
    return load_layers([*layers, *_override_layer(overrides)], name, given)


def load_layers(layers: Iterable[Layer], source: str, given: tuple[str, ...] = ()) -> Resolved:
    """The config that layers come to, later ones winning. Raises ConfigError, naming `source`."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        merged = _merge(merged, layer, origin, origins, ())
    for block in given:
        merged.setdefault(block, {"target": f"{CALLER}:{block}"})
    try:
        return Resolved(Config.model_validate(merged), origins)
    except ValidationError as error:
        raise ConfigError(problems_of(error, merged, origins), source) from None


def find_config(source: str | Path) -> Path:
    """The file that `source` names: itself, or a shipped config."""
    path = Path(source)
    shipped = shipped_configs()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"  # a run directory
    close = difflib.get_close_matches(str(source), shipped, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        [f"no such file, and no shipped config of that name{hint} (shipped: {', '.join(shipped)})"],
        str(source),
    )


def _file_layers(path: Path, seen: list[Path]) -> list[Layer]:
    if path.resolve() in seen:
        chain = " -> ".join(str(p) for p in [*seen, path.resolve()])
        raise ConfigError([f"base: refers back to itself: {chain}"], str(path))
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError([f"must hold a mapping of blocks, not {type(content).__name__}"], str(path))
    return [
        *base_layers(content, path.parent, [*seen, path.resolve()], str(path)),
        (str(path), _without_base(content)),
    ]


def base_layers(content: dict[str, Any], folder: Path, seen: list[Path], source: str) -> list[Layer]:
    """The layers of the config that `base:` names, a file in `folder` or a shipped one; none without it."""
    if "base" not in content:
        return []
    base = content["base"]
    if not isinstance(base, str) or not base:
        raise ConfigError([f"base: must be a file or the name of a shipped config, not {base!r}"], source)
    beside = folder / base
    try:
        file = beside if beside.is_file() else find_config(base)
    except ConfigError as error:
        raise ConfigError([f"base: {base}: {error.problems[0]}"], source) from None
    return _file_layers(file, seen)


def _without_base(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "base"}


def _override_layer(overrides: tuple[str, ...] | list[str]) -> list[Layer]:
    """All overrides as one layer, so that their order among themselves decides and nothing else."""
    layer: dict[str, Any] = {}
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            problems.append(f"{override!r}: an override reads a.b=value")
            continue
        value = parse_yaml(text, f"override {override!r}") if text.strip() else None
        node = layer
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        before = node.get(keys[-1])
        node[keys[-1]] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    if problems:
        raise ConfigError(problems, "overrides")
    return [("command line", layer)] if layer else []


def _merge(
    below: dict[str, Any], above: dict[str, Any], origin: str, origins: dict[str, str], path: tuple[str, ...]
) -> dict[str, Any]:
    """`above` on top of `below`. A block whose `kind` (or `target`) changes is a new block: nothing stays."""
    merged = dict(below)
    for key, value in above.items():
        here = (*path, str(key))
        old = merged.get(key)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and here not in ONE_OF
            and not _is_other_kind(old, value)
        ):
            merged[key] = _merge(old, value, origin, origins, here)
            continue
        dotted = ".".join(here)
        for stale in [p for p in origins if p == dotted or p.startswith(dotted + ".")]:
            del origins[stale]
        origins.update(dict.fromkeys(_leaf_paths(value, dotted), origin))
        merged[key] = value
    return merged


def _is_other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(tag in new and new[tag] != old.get(tag) for tag in ("kind", "target"))


def _leaf_paths(value: Any, dotted: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [p for key, v in value.items() for p in _leaf_paths(v, f"{dotted}.{key}")]
    return [dotted]
