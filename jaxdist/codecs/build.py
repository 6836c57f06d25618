"""From `gradient_compression:` to codecs: one for each parameter, and the programs that a run goes through."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxdist import codecs
from jaxdist.codecs import error_feedback as memories
from jaxdist.codecs.codec import Codec, Exchange, Keys, Reduces, held_down
from jaxdist.config import compression as options
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.target import call
from jaxdist.leaves import Leaf, is_leaf

WHERE = "gradient_compression"
MANY = 2**20  # elements, where a whole array's contraction is asked for before there is one
SENT_AS_THEY_ARE = ("norm", "bias")  # kinds of parameter that `up` leaves alone: few bytes, much harm

_KINDS: dict[str, Any] = {
    "bf16": codecs.BF16, "fp16": codecs.FP16, "fp8": codecs.FP8, "int8": codecs.Int8, "int4": codecs.Int4,
    "qsgd": codecs.QSGD, "terngrad": codecs.TernGrad, "sign": codecs.Sign, "majority_vote": codecs.MajorityVote,
    "topk": codecs.BlockTopK, "exact_topk": codecs.TopK, "threshold": codecs.Threshold,
    "randomk": codecs.RandomK, "powersgd": codecs.PowerSGD,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A program that a run goes through: which codecs it has."""

    name: str  # dense, warmup_1, warmup_2, ..., compressed; gentle and strong where they are chosen as the run goes
    first_step: int | None  # None: none of its own, chosen as the run goes
    up: Any  # blocks of codecs
    policy: tuple[tuple[str, Any], ...] = ()


def stages(block: options.GradientCompression) -> list[Stage]:
    """The programs of a run in order: dense steps, falling ratios (Lin et al. 2018, arXiv 1712.01887, section 3.2),
    then the codecs as they are given; `dense` alone where nothing is compressed.

    Steps of warm-up are counted from the end of `dense_steps`; a codec's ratios have equal numbers of them.
    """
    dense, start, found = options.NoCompression(), block.dense_steps, []
    policy = tuple((pattern, codec) for rule in block.policy for pattern, codec in rule.items())
    if start or not block.codecs:
        found.append(Stage("dense", 0, dense))
    if not block.codecs:
        return found
    if isinstance(block.up, options.Adaptive):
        chosen = Stage("gentle", start, block.up.gentle, policy), Stage("strong", None, block.up.strong, policy)
        return [*found, *chosen]
    *warmup, end = sorted({step for codec in block.codecs.values() for step in _changes(codec)})
    for number, step in enumerate(warmup, 1):
        rules = tuple((pattern, _at(codec, step)) for pattern, codec in policy)
        found.append(Stage(f"warmup_{number}", start + step, _at(block.up, step), rules))
    return [*found, Stage("compressed", start + end, block.up, policy)]


def codec_of(block: Any, where: str, error_feedback: Any = None) -> Codec | None:
    """The codec that a block describes; None for kind none.

    Args:
      where: the block's place in the config, for errors.
      error_feedback: as in the config; without it random-k is scaled to be unbiased.

    Raises:
      UserError: an argument is out of range, or a user's own codec lacks part of the protocol.
    """
    if isinstance(block, options.NoCompression):
        return None
    if isinstance(block, Target):
        return _checked(call(block, where), block.target, where)
    arguments = block.model_dump(exclude={"kind", "warmup_steps"})
    if isinstance(block, options.RandomK):
        arguments["scaled"] = error_feedback is False
    try:
        return _KINDS[block.kind](**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def choose(stage: Stage, leaves: Any, shards: Any, error_feedback: Any = None) -> tuple[Codec | None, ...]:
    """The codec of each parameter, in the order of `jax.tree.leaves(leaves)`; None: sent as it is.

    Args:
      leaves: tree of Leaf. shards: tree of ShapeDtypeStruct like it, what one device encodes.
      error_feedback: as in the config.

    Raises:
      UserError: a rule that no parameter needs, codecs that make no parameter smaller, or error feedback with a
        codec whose error it could not hold down.
    """
    flat: list[Leaf] = jax.tree.leaves(leaves, is_leaf=is_leaf)
    up = codec_of(stage.up, f"{WHERE}.up", error_feedback)
    rules = [
        (pattern, f"{WHERE}.policy.{i}.{pattern}", codec_of(block, f"{WHERE}.policy.{i}.{pattern}", error_feedback))
        for i, (pattern, block) in enumerate(stage.policy)
    ]
    used: set[str] = set()
    found: list[Codec | None] = []
    for leaf, shard in zip(flat, jax.tree.leaves(shards), strict=True):
        rule = next((rule for rule in rules if re.search(rule[0], leaf.name)), None)
        used |= {rule[1]} if rule else set()
        left_alone = None if leaf.kind in SENT_AS_THEY_ARE else up
        where, codec = (rule[1], rule[2]) if rule else (f"{WHERE}.up", left_alone)
        if isinstance(codec, codecs.PowerSGD):
            codec = dataclasses.replace(codec, stacked=leaf.stacked)
        found.append(_fitting(codec, shard, where, error_feedback))
    for pattern, where, _ in rules:
        if where not in used:
            taken = any(re.search(pattern, leaf.name) for leaf in flat)
            why = (
                "earlier rules take all that it matches"
                if taken
                else f"no parameter matches (--explain prints all): {_names(flat)}"
            )
            raise UserError(f"{where}: has no effect, {why}")
    if not any(found) and (up or any(codec for *_, codec in rules)):
        raise UserError(f"{WHERE}: its codecs make none of this model's parameters smaller; use others, or none")
    return tuple(found)


def feeds_back(codec: Codec, error_feedback: Any) -> bool:
    """Whether what this codec leaves out is remembered, by `error_feedback` of the config: if it is null, where the
    codec is biased and feedback holds its error down."""
    if error_feedback is None:
        return not codec.unbiased and held_down(codec, MANY)
    return error_feedback is not False


def feedback_of(error_feedback: Any, chosen: Sequence[Codec | None]) -> memories.Feedback:
    """What `error_feedback` of the config asks for, with these codecs."""
    match error_feedback:
        case options.EF21():
            return memories.EF21()
        case options.ErrorFeedback(momentum=momentum, clip_norm=clip_norm):
            return memories.ErrorFeedback(momentum, clip_norm)
    on = any(codec is not None and feeds_back(codec, error_feedback) for codec in chosen)
    return memories.ErrorFeedback() if on else memories.NoFeedback()


def _changes(codec: Any) -> list[int]:
    """Steps, counted from the end of `dense_steps`, from which each of its ratios is used, the last for good."""
    warmup_steps = getattr(codec, "warmup_steps", 0)
    number = len(codec.warmup_ratios) if warmup_steps else 0
    return [*(i * warmup_steps // number for i in range(number)), warmup_steps]


def _at(codec: Any, step: int) -> Any:
    """The codec's block with the ratio that it has at a step of the warm-up."""
    if step >= (changes := _changes(codec))[-1]:
        return codec
    return codec.model_copy(update={"ratio": codec.warmup_ratios[sum(change <= step for change in changes) - 1]})


def _fitting(codec: Codec | None, shard: jax.ShapeDtypeStruct, where: str, error_feedback: Any) -> Codec | None:
    """The codec if it takes this array. Raises UserError if error feedback was asked for and would do harm."""
    if codec is None or shard.size == 0 or not codec.takes(shard):
        return None
    if error_feedback not in (None, False) and not held_down(codec, shard.size):
        raise UserError(
            f"{where}: {codec} is no contraction: its error may be larger than the gradient, and error feedback "
            f"would let it grow from step to step; set {WHERE}.error_feedback: false, or use a finer codec (more "
            "bits, a smaller block)"
        )
    return codec


def _checked(codec: Any, target: str, where: str) -> Codec:
    """A user's own codec. Raises UserError unless it has what jaxdist.codecs.codec asks for."""
    needed = [name for name in vars(Codec) if not name.startswith("_")] + list(Codec.__annotations__)
    missing = [name for name in needed if not hasattr(codec, name)]
    if missing:
        raise UserError(
            f"{where}.target: {target} gave a {type(codec).__name__}, which is no codec: it lacks "
            f"{', '.join(missing)} (see jaxdist.codecs.codec.Codec)"
        )
    if not isinstance(codec, Reduces) and codec.exchange not in get_args(Exchange):
        raise UserError(
            f"{where}.target: {target} has exchange {codec.exchange!r}; allowed: {', '.join(get_args(Exchange))}"
        )
    _check_round_trip(codec, target, where)
    try:
        hash(codec)
    except TypeError:
        raise UserError(
            f"{where}.target: {target} gave a codec that cannot be hashed, and it is part of a compiled program; "
            "make it a frozen dataclass of plain values"
        ) from None
    return codec


def _check_round_trip(codec: Any, target: str, where: str) -> None:
    """Raises UserError unless decode gives an array like the one that was encoded; nothing is computed."""
    spec = jax.ShapeDtypeStruct((3 * (codec.block or 100),), jnp.float32)

    def there_and_back(x: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        return codec.decode(codec.encode(x, codec.init(spec, key), Keys(key, key))[0], spec, key)

    try:
        found = jax.eval_shape(there_and_back, spec)
    except Exception as error:
        raise UserError(f"{where}.target: {target} fails on float32[{spec.size}]: {error!r}") from error
    if (found.shape, found.dtype) != (spec.shape, spec.dtype):
        raise UserError(
            f"{where}.target: decode of {target} gave {found.dtype}{list(found.shape)} for a spec of "
            f"{spec.dtype}{list(spec.shape)}"
        )


def _names(leaves: list[Leaf]) -> str:
    names = [leaf.name for leaf in leaves]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
