"""`model.experts:` a mixture of experts in the place of an MLP."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from jaxdist.config.base import Block


class Experts(Block):
    """MLPs of which each token takes a few, chosen by a router: by default Mixtral's. They have no biases."""

    count: int = Field(8, ge=2, description="experts in a block; strategy.mesh.expert divides it")
    per_token: PositiveInt = Field(2, description="experts that each token goes to")
    width: PositiveInt | None = Field(None, description="hidden features of an expert; model.mlp_width if null")
    shared: NonNegativeInt = Field(0, description="experts beside these that every token goes to (DeepSeek)")
    every: PositiveInt = Field(1, description="each so many blocks, the last has experts, the others an MLP")
    capacity_factor: PositiveFloat | None = Field(
        None,
        description="an expert takes at most this many times its even share of a sample's tokens, of others the "
        "residual alone goes on; null: no token is dropped",
    )
    renormalize: bool | None = Field(
        None,
        description="whether the chosen experts' weights, a softmax over all, are scaled to add up to 1 (Mixtral); "
        "null: yes, but for per_token: 1",
    )
    balance: Literal["auxiliary", "bias"] | None = Field(
        "auxiliary",
        description="what keeps the load even: a loss (Switch), or a bias on the choice that follows the load "
        "(DeepSeek-V3)",
    )
    auxiliary_weight: PositiveFloat = Field(0.01, description="of the auxiliary loss, which is 1 where load is even")
    bias_rate: PositiveFloat = Field(0.001, description="how much a bias changes in a step")
    z_weight: NonNegativeFloat = Field(
        0.0, description="of the router's z-loss, the mean of log(sum(exp(logits)))^2 (ST-MoE: 0.001)"
    )

    @model_validator(mode="after")
    def parts_fit_together(self) -> "Experts":
        problems = []
        if self.per_token > self.count:
            problems.append(f"per_token ({self.per_token}) must be at most count ({self.count})")
        if self.per_token == 1 and self.renormalize:
            problems.append(
                "renormalize: with per_token: 1 every weight would be 1 and the loss would teach the router nothing; "
                "leave it out"
            )
        for name, of in (("auxiliary_weight", "auxiliary"), ("bias_rate", "bias")):
            if self.changed(name) and self.balance != of:
                problems.append(f"{name} has no effect unless balance is {of}")
        if self.capacity_factor is not None and self.capacity_factor * self.per_token >= self.count:
            problems.append(
                f"capacity_factor: {self.capacity_factor} gives each expert room for all tokens, which is computed "
                "in full; leave it out, then no token is dropped either"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def expert_problems(model: Any, strategy: Any) -> list[str]:
    """Where experts and the mesh do not go together; of a model of a user's own, jaxdist.sharding tells."""
    mesh, experts = getattr(strategy, "mesh", None), getattr(model, "experts", None)
    if getattr(strategy, "kind", None) != "sync" or mesh is None or hasattr(model, "target"):
        return []
    problems = []
    if mesh.expert != 1 and experts is None:
        instead = "model.experts: {count: 8}" if getattr(model, "kind", None) == "transformer" else "a transformer's"
        problems.append(
            f"strategy.mesh.expert: {mesh.expert} would split nothing, the model has no experts; use data or fsdp, "
            f"or give it some ({instead})"
        )
    elif mesh.expert > 1 and experts is not None and experts.count % mesh.expert:
        fit = ", ".join(str(n) for n in range(1, experts.count + 1) if experts.count % n == 0)
        problems.append(
            f"strategy.mesh.expert: {mesh.expert} does not divide model.experts.count ({experts.count}); sizes that "
            f"do: {fit}"
        )
    if mesh.context != 1 and experts is not None and experts.capacity_factor is not None:
        problems.append(
            "model.experts.capacity_factor: counts the tokens of a whole sample, which strategy.mesh.context splits; "
            "leave it out, then no token is dropped"
        )
    return problems
