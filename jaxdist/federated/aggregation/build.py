"""From the blocks `aggregator:` and `attack:` to the functions that do it."""

from collections.abc import Callable
from typing import Any

import jax

from jaxdist.config import aggregation as options
from jaxdist.federated.aggregation.attacks import Attack, Gaussian, Scaled
from jaxdist.federated.aggregation.coordinates import Mean, Median, TrimmedMean
from jaxdist.federated.aggregation.distances import GeometricMedian, Krum
from jaxdist.federated.aggregation.slices import Slices


def rule_of(block: Any) -> Callable[[Slices], jax.Array]:
    """The rule that a block of `aggregator:` describes; its clip_norm is for the messages before (`clip`)."""
    match block:
        case options.TrimmedMean():
            return TrimmedMean(block.fraction)
        case options.Median():
            return Median()
        case options.Krum():
            return Krum(block.byzantine)
        case options.MultiKrum():
            return Krum(block.byzantine, block.selected)
        case options.GeometricMedian():
            return GeometricMedian(block.iterations, block.smoothing)
    assert isinstance(block, options.Mean)
    return Mean()


def attack_of(block: Any) -> Attack:
    """What a block of `attack:` does to messages; labels are `flip_labels`' where its kind is label_flip."""
    match block:
        case options.SignFlip():
            return Scaled(-block.scale)
        case options.Gaussian():
            return Gaussian(block.scale)
    assert isinstance(block, options.Scaled | options.LabelFlip)
    return Scaled(block.scale)
