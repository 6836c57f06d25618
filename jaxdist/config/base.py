"""What every block of the config is made of."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FilePath = Annotated[Path, Field(strict=False)]  # YAML has no path type


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regular_expression)]

Better = Literal["min", "max"] | None


def better(metric: str, mode: Better) -> Literal["min", "max"]:
    """Whether less or more of a metric is better, unless `mode` says it: more accuracy (and of its statistics over
    clients all but the variance), more of what says how alike clients fare, less of all else."""
    *_, of, last = ("", *metric.split("."))
    more = last.endswith(("accuracy", "jain", "entropy")) or (of.endswith("accuracy") and last != "variance")
    return mode or ("max" if more else "min")


class Block(BaseModel):
    """One block of the config: typed, frozen, and closed to unknown keys.

    Strict: `true` is no number and `"4"` no integer; an integer may stand for a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    def changed(self, name: str) -> bool:
        """Whether a field differs from its default: what a rule against options without effect looks at, so
        that a resolved config, in which every default is written out, stays valid."""
        return getattr(self, name) != type(self).model_fields[name].default


class Target(Block):
    """A user's own part, `{target: "package.module:Name", argument: value, ...}`, in place of any `kind`.

    `Name` is called with the remaining keys as keyword arguments, plus what the place that uses it offers
    and `Name` accepts.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    target: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", description="package.module:Name")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def kind_or_target(value: Any) -> str | None:
    """The tag that selects a member of a union of kinds: its `kind`, or `target` for a user's own part."""
    if isinstance(value, dict):
        return "target" if "target" in value else value.get("kind")
    return getattr(value, "kind", "target" if isinstance(value, Target) else None)
