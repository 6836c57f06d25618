"""The model classes of Hugging Face that can be read and written, by the `model_type` of their config.json."""

import json
from pathlib import Path
from re import Pattern
from typing import Any, Protocol, cast

from jaxdist.config.errors import UserError
from jaxdist.pretrained import gpt2, llama
from jaxdist.pretrained.fields import positive
from jaxdist.pretrained.recipe import Recipes
from jaxdist.pretrained.shape import Shape


class Family(Protocol):
    """A module that says how one class stores a model; see gpt2.py."""

    CLASS: str
    PREFIX: str
    BUFFERS: Pattern[str]

    def block(self, config: dict[str, Any]) -> dict[str, Any]: ...
    def unsupported(self, config: dict[str, Any]) -> list[str]: ...
    def cannot_express(self, shape: Shape) -> list[str]: ...
    def config_of(self, shape: Shape) -> dict[str, Any]: ...
    def recipes(self, shape: Shape) -> Recipes: ...


FAMILIES = {"gpt2": cast(Family, gpt2), "llama": cast(Family, llama)}


def read_config(directory: Path) -> tuple[Family, dict[str, Any]]:
    """A directory's family and config.json. Raises UserError if it is none that can be read."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: has no config.json; give a directory as transformers' save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_text())
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({error})") from None
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(f"{path}: model_type is {kind!r}; weights are read of {' and '.join(FAMILIES)}")
    try:
        positive(config, "vocab_size")
        family.block(config)
        if problems := family.unsupported(config):
            raise UserError("\n  ".join(["describes a model that cannot be had here", *problems]))
    except (UserError, TypeError, AttributeError) as error:  # the latter two: a field of a wrong type
        raise UserError(f"{path}: {error}") from None
    return family, config
