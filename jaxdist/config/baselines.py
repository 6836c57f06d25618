"""What a federation is compared with: every client alone, and all their samples in one place."""

from typing import Any

EVERYTHING = ".*"  # as `personal`: nothing leaves a client
OF_BOTH = {"kind", "local_epochs", "local_steps", "worker_batch_size", "client_evaluation", "lanes"}  # have an effect
ALONE = OF_BOTH | {"personal", "clients_per_round", "sampling", "availability", "device_speeds"}
POOLED = OF_BOTH | {"pooled"}


def baseline_problems(config: Any) -> list[str]:
    """What has no effect where nothing is sent, and where there is only one client."""
    strategy, allowed = config.strategy, ALONE
    if strategy.pooled:
        why, allowed = "pooled is training on all samples in one place", POOLED
    elif EVERYTHING in strategy.personal:
        why = f"with personal: [{EVERYTHING!r}] nothing leaves a client"
    else:
        return []
    given = [name for name in type(strategy).model_fields if name not in allowed and strategy.changed(name)]
    given = [f"strategy.{name}" for name in given]
    if config.gradient_compression.codecs or getattr(config.gradient_compression.down, "kind", "none") != "none":
        given.append("gradient_compression")
    return [f"{name}: has no effect, {why}; leave it out" for name in given]
