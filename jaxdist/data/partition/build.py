"""From a `data.partition:` block to clients."""

import numpy as np

from jaxdist.config import partition as blocks
from jaxdist.config.errors import UserError
from jaxdist.data.order import derive_key, permute
from jaxdist.data.partition import labels as kinds
from jaxdist.data.partition.natural import field_of, owners_of
from jaxdist.data.partition.partition import Partition, grouped, keep_for_validation, numbered
from jaxdist.data.partition.repair import repair
from jaxdist.data.partition.sizes import sizes_of
from jaxdist.data.source import Source


def build_partition(block: blocks.Partition, source: Source, ids: np.ndarray, seed: int) -> Partition:
    """Divides the samples `ids` of a source over the clients of a block.

    A function of its arguments alone; the draws are those of the running NumPy's `Generator`, which a newer one may
    change: a manifest keeps the result.

    Args:
      block: without a manifest.
      ids: int64 [samples], distinct.
      seed: of the run; sizes, labels, who gets which sample and what is kept for validation are drawn apart.

    Raises:
      UserError: when the data cannot be divided so.
    """
    ids = np.sort(ids)
    if block.natural is not None:
        made = _natural(block.natural, block.min_samples, source, ids)
    else:
        assert block.clients is not None
        made = _drawn(block, block.clients, source, ids, seed)
    if block.validation_fraction is None:
        return made
    rank = permute(np.arange(len(made.ids)), len(made.ids), derive_key(seed, "partition", "validation"))
    return keep_for_validation(made, block.validation_fraction, rank)


def labels_of(source: Source, ids: np.ndarray) -> np.ndarray | None:
    """The labels y of the samples `ids`, int32 [samples]; None where the data have none."""
    return field_of(source, "y", ids) if _labelled(source) else None


def _labelled(source: Source) -> bool:
    y = source.features.get("y")
    return source.classes is not None and y is not None and not y.shape and y.dtype.kind in "iu"


def _natural(field: str, minimum: int, source: Source, ids: np.ndarray) -> Partition:
    client, names = owners_of(source, field, ids)
    stays = np.bincount(client, minlength=len(names)) >= minimum
    if not stays.any():
        raise UserError(
            f"data.partition.min_samples: no value of {field} has {minimum} samples; the most is "
            f"{np.bincount(client).max()}"
        )
    number = np.where(stays, np.cumsum(stays) - 1, kinds.NOBODY)
    return grouped(ids, number[client], tuple(name for name, stay in zip(names, stays, strict=True) if stay))


def _drawn(block: blocks.Partition, num_clients: int, source: Source, ids: np.ndarray, seed: int) -> Partition:
    if num_clients * block.min_samples > len(ids):
        raise UserError(
            f"data.partition: {num_clients} clients of at least {block.min_samples} samples need "
            f"{num_clients * block.min_samples:,}, and {len(ids):,} are for training; lower clients or min_samples"
        )
    label = np.zeros(len(ids), np.int64)
    if not isinstance(block.labels, blocks.IID):
        label = np.unique(_needed_labels(block.labels, source, ids), return_inverse=True)[1]
    shuffled = permute(np.arange(len(ids)), len(ids), derive_key(seed, "partition", "samples"))
    order = np.lexsort((shuffled, label))
    client = np.empty(len(ids), np.int64)
    client[order] = _clients_by_label(block, num_clients, np.bincount(label), seed)
    return grouped(ids, client, numbered(num_clients))


def _needed_labels(block: blocks.Labels, source: Source, ids: np.ndarray) -> np.ndarray:
    found = labels_of(source, ids)
    if found is None:
        what = "tokens, which have no labels" if "tokens" in source.features else "no field y of integer labels"
        raise UserError(
            f"data.partition.labels: {block.kind} divides labels, and the data have {what}; use labels: "
            "{kind: iid} with sizes, or natural"
        )
    return found


def _clients_by_label(block: blocks.Partition, num_clients: int, stock: np.ndarray, seed: int) -> np.ndarray:
    """The client of each sample, int64 [samples], for samples sorted by label and shuffled within."""
    num_samples, num_labels = int(stock.sum()), len(stock)
    random = _random(seed, "labels")

    def sizes() -> np.ndarray:
        return sizes_of(block.sizes, num_samples, num_clients, block.min_samples, _random(seed, "sizes"))

    match block.labels:
        case blocks.IID():
            return kinds.dealt(sizes()[:, None], stock)
        case blocks.Stratified():
            return kinds.dealt(kinds.stratified(sizes(), stock, random), stock)
        case blocks.Shards(per_client=per_client):
            if num_clients * per_client > num_samples:
                raise UserError(
                    f"data.partition.labels: {num_clients} clients x {per_client} shards are more than the "
                    f"{num_samples:,} training samples; lower per_client"
                )
            return kinds.shards(sizes(), per_client, random)
        case blocks.Dirichlet(alpha=alpha) if block.sizes is None:
            drawn = kinds.log_dirichlet(np.full(num_clients, alpha), num_labels, random)
            counts = kinds.dirichlet_by_label(drawn, stock)
            return kinds.dealt(repair(counts, block.min_samples, drawn.T), stock)
        case blocks.Dirichlet(alpha=alpha):
            drawn = kinds.log_dirichlet(alpha * num_labels * stock / num_samples, num_clients, random)
            return kinds.dealt(kinds.dirichlet_by_client(drawn, sizes(), stock, random), stock)
        case blocks.LabelsPerClient(labels=per_client):
            if per_client > num_labels:
                raise UserError(
                    f"data.partition.labels: labels: {per_client} of each client are more than the {num_labels} "
                    "that the training samples have"
                )
            owners = kinds.draw_owners(num_clients, num_labels, per_client, random)
            counts = kinds.shared_by_owners(owners, stock, sizes() if block.sizes else None)
            if counts.sum() < num_clients * block.min_samples:
                raise UserError(
                    f"data.partition.labels: the labels of {num_clients} clients, {per_client} each, have "
                    f"{counts.sum():,} samples, too few for min_samples {block.min_samples}; lower it, or give "
                    "clients more labels"
                )
            return kinds.dealt(repair(counts, block.min_samples, owners + random.random(owners.shape)), stock)
    raise AssertionError(f"no partition for {block.labels!r}")


def _random(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array(derive_key(seed, "partition", purpose)[:2])))
