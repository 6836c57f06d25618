"""MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439) as a data source: generated, nothing is downloaded."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)
def mnist1d() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(training, validation): x float32 [4000 or 1000, 40], y int32; of the package `mnist1d` with its defaults."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())

    def part(suffix: str) -> dict[str, np.ndarray]:
        return {"x": made[f"x{suffix}"].astype(np.float32), "y": made[f"y{suffix}"].astype(np.int32)}

    return part(""), part("_test")
