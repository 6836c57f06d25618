"""How unlike the clients are, in numbers.

Shape letters: C clients, L labels.
"""

from dataclasses import dataclass

import numpy as np

from jaxdist.data.partition.partition import Partition


@dataclass(frozen=True)
class LabelSkew:
    """Of label distributions, p_c of client c and p of all; means and extremes over clients that have samples.

    total_variation: half the sum of |p_c - p|, 0 to 1. jensen_shannon: the root of the divergence in bits, 0 to 1
    (Endres and Schindelin 2003). effective_classes: exp of the entropy of p_c, 1 to the number of labels.
    """

    total_variation_mean: float
    total_variation_max: float
    jensen_shannon_mean: float
    jensen_shannon_max: float
    effective_classes_mean: float
    effective_classes_min: float


@dataclass(frozen=True)
class Heterogeneity:
    """Sizes and, where the data have labels, their skew. gini: of the sizes, 0 where all are equal, towards 1 where
    one client has all."""

    num_clients: int
    size_min: int
    size_median: float
    size_max: int
    gini: float
    labels: LabelSkew | None


def describe(partition: Partition, labels: np.ndarray | None) -> Heterogeneity:
    """Numbers of a partition.

    Args:
      labels: of `partition.ids`, integers [samples]; None where the data have none.
    """
    sizes = partition.sizes
    skew = None if labels is None else label_skew(label_counts(partition, labels))
    return Heterogeneity(
        len(sizes), int(sizes.min()), float(np.median(sizes)), int(sizes.max()), gini_coefficient(sizes), skew
    )


def label_counts(partition: Partition, labels: np.ndarray) -> np.ndarray:
    """Samples of each label at each client, int64 [C, L], from labels of `partition.ids`; L is the largest + 1."""
    num_labels = int(labels.max()) + 1
    flat = np.bincount(partition.clients * num_labels + labels, minlength=partition.num_clients * num_labels)
    return flat.reshape(partition.num_clients, num_labels)


def label_skew(counts_CxL: np.ndarray) -> LabelSkew:
    """Of counts of each label at each client, not all 0."""
    held = counts_CxL[counts_CxL.sum(axis=1) > 0]
    p_CxL = held / held.sum(axis=1, keepdims=True)
    p_L = held.sum(axis=0) / held.sum()
    middle = (p_CxL + p_L) / 2
    variation = np.abs(p_CxL - p_L).sum(axis=1) / 2
    divergence = _entropy(middle) - (_entropy(p_CxL) + _entropy(p_L)) / 2
    distance = np.sqrt((divergence / np.log(2)).clip(0))
    effective = np.exp(_entropy(p_CxL))
    found = (variation.mean(), variation.max(), distance.mean(), distance.max(), effective.mean(), effective.min())
    return LabelSkew(*map(float, found))


def gini_coefficient(sizes: np.ndarray) -> float:
    """Mean absolute difference of two sizes over twice their mean."""
    ascending = np.sort(sizes)
    num = len(ascending)
    return float(((2 * np.arange(1, num + 1) - num - 1) * ascending).sum() / (num * ascending.sum()))


def _entropy(p: np.ndarray) -> np.ndarray:
    """In nats, over the last dimension."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def lines(found: Heterogeneity) -> list[str]:
    """For a person."""
    shown = [
        f"{'sizes':<12}min {found.size_min:,}, median {found.size_median:,.0f}, max {found.size_max:,}, "
        f"Gini {found.gini:.3f}"
    ]
    if (skew := found.labels) is not None:
        shown += [
            f"{'labels':<12}total variation to all: mean {skew.total_variation_mean:.3f}, "
            f"max {skew.total_variation_max:.3f}",
            f"{'':<12}Jensen-Shannon distance to all: mean {skew.jensen_shannon_mean:.3f}, "
            f"max {skew.jensen_shannon_max:.3f}",
            f"{'':<12}effective classes: mean {skew.effective_classes_mean:.2f}, "
            f"min {skew.effective_classes_min:.2f}",
        ]
    return shown
