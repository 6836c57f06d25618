"""`model_compression:` what makes a model smaller as it trains."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from jaxdist.config.base import Block, Pattern

Method = Literal["magnitude", "random", "saliency", "snip", "movement", "straight_through", "set", "rigl"]
GROWING = ("set", "rigl")
HIDING = ("movement", "straight_through")
Part = Annotated[float, Field(ge=0, lt=1)]


def _n_of_m(pattern: str) -> str:
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"{pattern!r} is no n:m, such as 2:4: of every m weights n are live, fewer than m")
    return pattern


class Prune(Block):
    """Which weights are set to 0 and stay 0, and when. Steps are updates of the optimizer, counted from 0; of the
    server's with parameter_server, rounds with federated."""

    method: Method = Field(
        "magnitude",
        description="what is set to 0 first. magnitude: the smallest; random; saliency: the smallest |w g|; snip: "
        "saliency at the first step, over all layers together; movement: what moves towards 0; straight_through: the "
        "smallest, but all learn on; set, rigl: as many grow as are dropped, at random or by their gradients",
    )
    sparsity: Part | None = Field(None, description="part of the pruned weights that is 0 in the end")
    pattern: Annotated[str, AfterValidator(_n_of_m)] | None = Field(
        None,
        description="n:m, such as 2:4, in place of sparsity: of every m weights along a matrix's input n are live",
    )
    schedule: Literal["cubic", "iterative", "constant"] = Field(
        "cubic",
        description="how the sparsity grows: cubic; iterative: each update leaves the same part of what is left; "
        "constant: all at once",
    )
    begin: NonNegativeInt = Field(0, description="step of the first update of the masks")
    end: NonNegativeInt | None = Field(None, description="step after which none follows; by default only one is made")
    every: PositiveInt = Field(100, description="steps from one update of the masks to the next")
    distribution: Literal["uniform", "erk", "global"] = Field(
        "uniform",
        description="over layers. uniform: of each the same part; erk: less of small ones (Erdos-Renyi-Kernel); "
        "global: wherever scores are smallest",
    )
    include: tuple[Pattern, ...] | None = Field(
        None, strict=False, description="regular expressions of names of parameters; by default matrices and "
        "convolutions",
    )  # fmt: skip
    exclude: tuple[Pattern, ...] = Field(
        (), strict=False, description="regular expressions of names that are left out"
    )
    drop: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="of set and rigl: part of live weights dropped at the first update; it falls to 0"
    )
    learning_sparsity: Part = Field(
        0.0, description="of straight_through: part of the weights, the smallest, that does not learn (Top-KAST)"
    )
    rewind_to: NonNegativeInt | None = Field(
        None, description="every update of the masks goes back to the weights before this step (lottery tickets)"
    )

    @model_validator(mode="after")
    def options_have_an_effect(self) -> "Prune":
        problems = [*self._amount_problems(), *self._schedule_problems()]
        if self.changed("drop") and self.method not in GROWING:
            problems.append(f"drop has an effect with method {' or '.join(GROWING)} alone")
        if self.learning_sparsity and self.method != "straight_through":
            problems.append("learning_sparsity has an effect with method straight_through alone")
        if self.sparsity is not None and self.learning_sparsity > self.sparsity:
            problems.append(f"learning_sparsity is at most sparsity ({self.sparsity}): what is live learns")
        if self.rewind_to is not None:
            if self.method in (*GROWING, *HIDING, "snip"):
                problems.append("rewind_to goes with magnitude, random and saliency")
            if self.rewind_to >= self.begin:
                problems.append(f"rewind_to is before begin ({self.begin}), when weights have been trained")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _amount_problems(self) -> list[str]:
        if (self.sparsity is None) == (self.pattern is None):
            return ["give either sparsity, such as 0.9, or pattern, such as 2:4"]
        if self.pattern is not None and (self.method in (*GROWING, "snip") or self.changed("distribution")):
            return ["a pattern is the same everywhere: it goes with no distribution, and not with set, rigl or snip"]
        return []

    def _schedule_problems(self) -> list[str]:
        """What is constant by its nature says nothing of a schedule."""
        if self.method == "snip":
            given = [name for name in ("schedule", "begin", "end", "every", "distribution") if self.changed(name)]
            return [f"{', '.join(given)}: snip prunes once, at the first step, all layers together"] if given else []
        problems = []
        if self.changed("schedule") and (self.method in GROWING or self.pattern is not None):
            problems.append(
                "schedule has an effect on a sparsity that grows: not with set or rigl, nor with a pattern"
            )
        if self.end is None:
            if self.changed("every") or self.method in GROWING:
                problems.append("end: say the step of the last update of the masks")
        elif self.end < self.begin:
            problems.append(f"end is at least begin ({self.begin})")
        return problems


class ModelCompression(Block):
    """None of it by default."""

    prune: Prune | None = Field(None, description="weights that are set to 0 and stay 0")


def model_compression_problems(
    block: ModelCompression, *, steps_locally: bool, servers: int, clips: bool
) -> list[str]:
    """Where it does not go with the strategy.

    Args:
      steps_locally: whether replicas or workers take steps of their own. servers: of a parameter_server, that
        each have a part of the parameters, else 0. clips: whether the optimizer clips by global norm.
    """
    problems: list[str] = []
    if block.prune is not None and steps_locally:
        problems.append(
            "model_compression.prune: replicas that take steps of their own would prune apart; use local_steps: 1"
        )
    if block.prune is not None and servers > 1 and block.prune.distribution != "uniform":
        problems.append(
            f"model_compression.prune.distribution: {block.prune.distribution} looks at all layers, and each of "
            f"{servers} servers has some; use uniform, or strategy.servers=1"
        )
    if block.prune is not None and servers > 1 and block.prune.method == "snip":
        problems.append("model_compression.prune.method: snip looks at all layers; use strategy.servers=1")
    if block.prune is not None and servers and clips:
        problems.append(
            "model_compression.prune: servers clip by the norm of all gradients; leave optimizer.clip_norm out"
        )
    return problems


def resolved(block: Prune) -> dict[str, Any]:
    """What `Prune` comes to, for `Schedule`: begin, end, every and kind; and the distribution."""
    if block.method == "snip":
        return {"begin": 0, "end": 0, "every": 1, "kind": "constant", "distribution": "global"}
    constant = block.method in GROWING or block.pattern is not None
    return {
        "begin": block.begin,
        "end": block.begin if block.end is None else block.end,
        "every": block.every,
        "kind": "constant" if constant else block.schedule,
        "distribution": block.distribution,
    }
