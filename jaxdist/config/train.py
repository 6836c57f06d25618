"""`train:` how long, how much at a time, in what precision, and what to do when a step goes wrong."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxdist.config.base import Better, Block, better


class Budget(Block):
    """How long to train: exactly one of these."""

    steps: PositiveInt | None = Field(None, description="optimizer updates of the shared parameters")
    samples: PositiveInt | None = Field(None, description="training samples")
    epochs: PositiveFloat | None = Field(None, description="passes over the training data")
    rounds: PositiveInt | None = Field(None, description="federated rounds")
    seconds: PositiveFloat | None = Field(None, description="seconds of training, over all attempts")

    @model_validator(mode="after")
    def exactly_one(self) -> "Budget":
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(type(self).model_fields)}; got {', '.join(given) or 'none'}"
            )
        return self


class StopAt(Block):
    """End early, once `metric` has reached `value`."""

    metric: str = Field(description="a name in metrics.jsonl, such as eval.loss")
    value: float = Field(description="the target")
    mode: Better = Field(
        None, description="min: at or below the value; max: at or above; by default max for accuracy, min else"
    )

    def reached(self, value: float) -> bool:
        return value >= self.value if better(self.metric, self.mode) == "max" else value <= self.value


class BatchWarmup(Block):
    """Begin with small batches: the number of samples doubles until it is `global_batch_size`."""

    start: PositiveInt = Field(description="samples of the first batches; global_batch_size is 2, 4, 8, ... times it")
    steps: PositiveInt = Field(description="after which the batch has its full size; as many steps at each size")


class Train(Block):
    budget: Budget = Field(Budget(steps=100), description="how long to train")
    stop_at: StopAt | None = Field(None, description="stop early at a target")
    global_batch_size: PositiveInt = Field(32, description="samples in one update, over all devices")
    accumulation_steps: PositiveInt = Field(1, description="microbatches that one update accumulates")
    batch_warmup: BatchWarmup | None = Field(None, description="begin with smaller batches, fewer microbatches first")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of compute; masters stay fp32")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; also at the end")
    eval_samples: PositiveInt | None = Field(None, description="validation samples used; all by default")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="loss or gradient is NaN or infinite: end the run, or leave the update out"
    )
    on_spike: Literal["ignore", "skip", "stop"] = Field("ignore", description="loss far above its average")
    spike_factor: PositiveFloat = Field(3.0, gt=1.0, description="loss over its running average that counts")
    max_skipped: PositiveInt = Field(20, description="updates left out in a row before the run ends")
    check_replicas_every: PositiveInt | None = Field(
        None, description="steps between comparisons of all replicas' parameters and optimizer state"
    )

    @model_validator(mode="after")
    def options_have_an_effect(self) -> "Train":
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps ({self.accumulation_steps}) must divide global_batch_size "
                f"({self.global_batch_size})"
            )
        if (warmup := self.batch_warmup) is not None:
            factor, rest = divmod(self.global_batch_size, warmup.start)
            if rest or factor < 2 or factor & (factor - 1):
                raise ValueError(
                    f"batch_warmup.start ({warmup.start}) must be global_batch_size ({self.global_batch_size}) over "
                    "2, 4, 8 or a higher power of two"
                )
            if warmup.steps < factor.bit_length() - 1:
                raise ValueError(
                    f"batch_warmup.steps ({warmup.steps}) must be at least {factor.bit_length() - 1}, the doublings"
                )
        if self.changed("spike_factor") and self.on_spike == "ignore":
            raise ValueError("spike_factor has no effect while on_spike is ignore")
        if self.changed("max_skipped") and "skip" not in (self.on_nonfinite, self.on_spike):
            raise ValueError("max_skipped has no effect unless on_nonfinite or on_spike is skip")
        return self
