"""jaxdist: a distributed trainer in JAX in which how the workers agree on parameters is a choice in a config.

`jaxdist.train(config)` runs a config; `jaxdist.load_run(directory)` reads a run back. `ModuleTask` makes a
task of a Flax NNX module and a loss.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Chain", "ModuleTask", "Task", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """Imported on first use, so that `jaxdist config` starts without jax."""
    if name == "train":
        from jaxdist.run import train

        return train
    if name == "load_run":
        from jaxdist.telemetry.run_directory import load_run

        return load_run
    if name == "Chain":
        from jaxdist.chain import Chain

        return Chain
    if name in ("ModuleTask", "Task"):
        from jaxdist import task

        return getattr(task, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
