"""From `gradient_compression:` to what travels between workers and shards."""

from dataclasses import dataclass
from typing import Any

import jax

from jaxdist.codecs.build import WHERE, choose, codec_of, feedback_of, feeds_back, stages
from jaxdist.codecs.codec import Codec, held_down
from jaxdist.codecs.error_feedback import Feedback, NoFeedback
from jaxdist.config import compression as options
from jaxdist.config.errors import UserError
from jaxdist.leaves import Leaf, is_leaf
from jaxdist.parameter_server.partition import Partition
from jaxdist.parameter_server.payloads import Payloads, ShardFormat
from jaxdist.parameter_server.rows import OfLeaves

SENT_WHOLE = ("norm", "bias")  # kinds of parameter that `down` leaves alone


@dataclass(frozen=True)
class Formats:
    """What travels, by shard; and what workers remember of what `up` leaves out, by leaf of the whole."""

    shards: tuple[ShardFormat, ...]
    feedback: Feedback = NoFeedback()  # noqa: RUF009 - immutable
    remembers: tuple[bool, ...] = ()

    def pulled(self, params: Any) -> Any:
        """ShapeDtypeStructs of what a worker has of parameters like these."""
        flat = [spec for shard in self.shards for spec in shard.params]
        return jax.tree.unflatten(jax.tree.structure(params), flat)


def build_formats(
    block: options.GradientCompression,
    leaves: Any,
    model_state: Any,
    partition: Partition,
    seed: int,
    rows: OfLeaves = (),
) -> Formats:
    """Args:
      leaves: tree of Leaf like the whole parameters. model_state: arrays or ShapeDtypeStructs.
      rows: of all leaves; (): none travels by row.

    Raises:
      UserError: codecs that do not fit the model, or that mean nothing to one push by itself.
    """
    _refuse(block)
    flat: list[Leaf] = jax.tree.leaves(leaves, is_leaf=is_leaf)
    rows = rows or (None,) * len(flat)
    specs = [
        jax.ShapeDtypeStruct(leaf.shape if ids is None else (ids.count, *leaf.shape[1:]), leaf.dtype)
        for leaf, ids in zip(flat, rows, strict=True)
    ]
    up: tuple[Codec | None, ...] = (None,) * len(flat)
    if block.codecs:
        (stage,) = stages(block)
        up = choose(stage, leaves, jax.tree.unflatten(jax.tree.structure(leaves, is_leaf=is_leaf), specs),
                    block.error_feedback)  # fmt: skip
    for leaf, ids, codec in zip(flat, rows, up, strict=True):
        if ids is not None and codec is not None:
            raise UserError(
                f"{WHERE}: of {leaf.name} only the rows that are touched travel, as they are; leave its codec out: "
                f"gradient_compression.policy: [{{{leaf.name}: {{kind: none}}}}]"
            )
    down = _down(block, flat, specs, rows)
    state = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(model_state))
    by_shard = zip(*(partition.of_shards(values) for values in (specs, up, down, rows)), strict=True)
    shards = []
    for shard, (own, ups, downs, ids) in enumerate(by_shard):
        pulled = Payloads(tuple(downs), tuple(own), seed, shard) if any(downs) else None
        pushed = Payloads(tuple(ups), tuple(own), seed, shard)
        shards.append(ShardFormat(pushed, pulled, tuple(own), () if shard else state, tuple(ids)))
    memory = feedback_of(block.error_feedback, up)
    if isinstance(memory, NoFeedback):
        return Formats(tuple(shards))
    remembers = tuple(codec is not None and feeds_back(codec, block.error_feedback) for codec in up)
    return Formats(tuple(shards), memory, remembers)


def _refuse(block: options.GradientCompression) -> None:
    where = f"{WHERE} under strategy parameter_server"
    if isinstance(block.error_feedback, options.EF21):
        raise UserError(
            f"{where}: error_feedback: ef21 needs every push to be applied, and servers may discard one; use "
            "error_feedback: true"
        )
    if isinstance(block.up, options.Adaptive):
        raise UserError(f"{where}: up: adaptive chooses one program for all replicas; give one codec")
    for place, codec in block.codecs.items():
        if isinstance(codec, options.MajorityVote):
            raise UserError(f"{where}: {place}: majority_vote counts votes, and a push may come alone; use sign")
        if getattr(codec, "warmup_steps", 0):
            raise UserError(f"{where}: {place}.warmup_steps: pushes have one codec from the first on; leave it out")
    if block.dense_steps:
        raise UserError(f"{where}: dense_steps: pushes have one codec from the first on; leave it out")


def _down(
    block: options.GradientCompression, leaves: list[Leaf], specs: list[jax.ShapeDtypeStruct], rows: OfLeaves
) -> list[Codec | None]:
    codec = codec_of(block.down, f"{WHERE}.down", error_feedback=True)
    if codec is None:
        return [None] * len(leaves)
    takes = [
        leaf.kind not in SENT_WHOLE and ids is None and spec.size > 0 and codec.takes(spec)
        for leaf, spec, ids in zip(leaves, specs, rows, strict=True)
    ]
    if not any(takes):
        raise UserError(f"{WHERE}.down: makes none of this model's parameters smaller; use another codec, or none")
    for spec, taken in zip(specs, takes, strict=True):
        if taken and not held_down(codec, spec.size):
            raise UserError(
                f"{WHERE}.down: {codec} is no contraction: what it leaves out, sent again with the next pull, could "
                "grow; use a finer codec (more bits, a smaller block)"
            )
    return [codec if taken else None for taken in takes]
