"""Messages through codecs: what travels of one, what the receiver makes of it, and what the sender remembers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist.codecs.build import WHERE, Stage, choose, codec_of, feedback_of, feeds_back, stages
from jaxdist.codecs.codec import held_down
from jaxdist.codecs.error_feedback import ErrorFeedback, Feedback, NoFeedback
from jaxdist.codecs.payloads import Payloads
from jaxdist.config import compression as options
from jaxdist.config.errors import UserError
from jaxdist.federated.transmit import Transmit, parameters_of
from jaxdist.leaves import Leaf, is_leaf

Memory = dict[str, Any]
Encoded = tuple[list[jax.Array], list[Any]]
SENT_WHOLE = ("norm", "bias")  # kinds of parameter that `down` leaves alone


@dataclass(frozen=True)
class Parcel:
    """How messages travel in some rounds: those of their leaves that do, each through its codec."""

    goes: tuple[bool, ...]
    payloads: Payloads  # of the leaves that go


@dataclass(frozen=True)
class Parcels:
    """Of a run: one parcel for each stage (dense rounds, falling ratios, then the codecs as they are given) and group
    of parameters. A client's memory is its own: {"feedback", "codecs"}.
    """

    parcels: tuple[tuple[Parcel, ...], ...]  # by stage, by group
    starts: tuple[int, ...]  # first round of each stage
    feedback: Feedback
    remembers: tuple[bool, ...]  # by leaf of a message
    specs: tuple[jax.ShapeDtypeStruct, ...]

    def of_round(self, round_: int) -> Parcel:
        stage = sum(round_ >= start for start in self.starts[1:])
        return self.parcels[stage][round_ % len(self.parcels[0])]

    def init(self, key: jax.Array) -> Memory:
        """Of a client that has not sent yet."""
        states: list[dict[str, Any]] = [{} for _ in self.parcels[0]]
        for stage in self.parcels:
            for group, parcel in enumerate(stage):
                states[group] |= parcel.payloads.init(key)
        feedback = {}
        if not isinstance(self.feedback, NoFeedback):
            kept = self.feedback.init(list(self.specs), list(self.remembers))
            feedback = {name: of for name, of in kept.items() if name not in self.feedback.shared}
        return {"feedback": feedback, "codecs": states}

    def send(self, message: Any, memory: Memory, round_: jax.Array, key: jax.Array) -> tuple[Any, Memory]:
        """(the message as the server sees it, zeros where nothing was sent; new memory). `key`: of round, client."""
        leaves, structure = jax.tree.flatten(message)
        num_groups = len(self.parcels[0])
        stage = sum((round_ >= start for start in self.starts[1:]), start=0)
        ways = [partial(self._through, parcel, i) for of in self.parcels for i, parcel in enumerate(of)]
        seen, memory = jax.lax.switch(stage * num_groups + round_ % num_groups, ways, leaves, memory, key)
        return jax.tree.unflatten(structure, seen), memory

    def _through(
        self, parcel: Parcel, group: int, leaves: list[jax.Array], memory: Memory, key: jax.Array
    ) -> tuple[list[jax.Array], Memory]:
        codecs = list(memory["codecs"])
        places = [i for i, goes in enumerate(parcel.goes) if goes]

        def exchange(arrays: list[jax.Array]) -> Encoded:
            _, seen, states = parcel.payloads.encode(arrays, codecs[group], key)
            codecs[group] = {**codecs[group], **states}
            return [x if s is None else s for x, s in zip(arrays, seen, strict=True)], seen

        own: Memory = {name: [of[i] for i in places] for name, of in memory["feedback"].items()}
        # Of a sender alone, what all believe of the mean is what they believe of it.
        believed: Memory = dict.fromkeys(self.feedback.shared, own.get("estimate"))
        sent, new = self.feedback.mean([leaves[i] for i in places], {**own, **believed}, exchange, _squared_norm, 1)
        feedback = {name: list(of) for name, of in memory["feedback"].items()}
        result = [jnp.zeros_like(x) for x in leaves]
        for n, i in enumerate(places):
            result[i] = sent[n].astype(leaves[i].dtype)
            for name, of in feedback.items():
                of[i] = new[name][n]
        return result, {"feedback": feedback, "codecs": codecs}


@dataclass(frozen=True)
class Downlink:
    """The parameters on their way to the clients, the same for all of them: encoded once, with a memory at the server
    of what was left out, which goes into the next round's."""

    payloads: Payloads  # of the parameters that clients share
    remembers: tuple[bool, ...]

    def init(self) -> list[Any]:
        return ErrorFeedback().init(list(self.payloads.specs), list(self.remembers))["residual"]

    def send(self, params: Any, residual: list[Any], key: jax.Array) -> tuple[Any, list[Any]]:
        """(the parameters as clients see them, new residual). `key`: of the round."""
        leaves, structure = jax.tree.flatten(params)

        def exchange(arrays: list[jax.Array]) -> Encoded:
            _, seen, _ = self.payloads.encode(arrays, {}, key)
            return [x if s is None else s for x, s in zip(arrays, seen, strict=True)], seen

        sent, new = ErrorFeedback().mean(leaves, {"residual": residual}, exchange, _squared_norm, 1)
        return jax.tree.unflatten(structure, sent), new["residual"]


def build_parcels(
    block: options.GradientCompression, message: Any, leaves: Any, transmit: Transmit | None
) -> Parcels | None:
    """None where messages travel as they are.

    Args:
      message: ShapeDtypeStructs of a client's. leaves: tree of Leaf of the parameters that clients share.

    Raises UserError for codecs that do not fit the model.
    """
    if not block.codecs:
        return None
    of_params: list[Leaf] = jax.tree.leaves(leaves, is_leaf=is_leaf)
    specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(message))
    owners = [None if place is None else of_params[place] for place in parameters_of(message, of_params)]
    groups = [transmit.goes(message, i) for i in range(transmit.num_groups)] if transmit else [(True,) * len(specs)]
    found, remembers, all_codecs = [], [False] * len(specs), []
    for stage in stages(block):
        codecs = _of_message(stage, specs, owners, block.error_feedback)
        all_codecs += codecs
        remembers = [
            before or (codec is not None and feeds_back(codec, block.error_feedback))
            for before, codec in zip(remembers, codecs, strict=True)
        ]
        found.append(tuple(Parcel(goes, _payloads(codecs, specs, goes)) for goes in groups))
    starts = tuple(stage.first_step or 0 for stage in stages(block))
    feedback = feedback_of(block.error_feedback, all_codecs)
    return Parcels(tuple(found), starts, feedback, tuple(remembers), specs)


def _of_message(
    stage: Stage, specs: Sequence[jax.ShapeDtypeStruct], owners: Sequence[Leaf | None], error_feedback: Any
) -> list[Any]:
    """The codec of each leaf of a message: that of the parameter it is of; of none, none."""
    codecs: list[Any] = [None] * len(specs)
    if isinstance(stage.up, options.NoCompression) and not stage.policy:
        return codecs
    named = [i for i, owner in enumerate(owners) if owner is not None]
    chosen = choose(stage, [owners[i] for i in named], [specs[i] for i in named], error_feedback)
    for i, codec in zip(named, chosen, strict=True):
        codecs[i] = codec
    return codecs


def _payloads(codecs: Sequence[Any], specs: Sequence[jax.ShapeDtypeStruct], goes: Sequence[bool]) -> Payloads:
    places = [i for i, one in enumerate(goes) if one]
    return Payloads(tuple(codecs[i] for i in places), tuple(specs[i] for i in places))


def build_downlink(block: options.GradientCompression, leaves: Any) -> Downlink | None:
    """None where parameters travel as they are. `leaves`: tree of Leaf of those that clients share.

    Raises UserError for a codec that makes none of them smaller, or whose error a memory would let grow.
    """
    codec = codec_of(block.down, f"{WHERE}.down", error_feedback=block.error_feedback)
    if codec is None:
        return None
    flat: list[Leaf] = jax.tree.leaves(leaves, is_leaf=is_leaf)
    specs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat)
    takes = [
        leaf.kind not in SENT_WHOLE and spec.size > 0 and codec.takes(spec)
        for leaf, spec in zip(flat, specs, strict=True)
    ]
    if not any(takes):
        raise UserError(f"{WHERE}.down: makes none of this model's parameters smaller; use another codec, or none")
    remembers = block.error_feedback is not False and not codec.unbiased
    if remembers and not all(held_down(codec, spec.size) for spec, one in zip(specs, takes, strict=True) if one):
        raise UserError(
            f"{WHERE}.down: {codec} is no contraction: what it leaves out, sent with the next round's, could grow; "
            "use a finer codec (more bits, a smaller block), or error_feedback: false"
        )
    codecs = tuple(codec if one else None for one in takes)
    return Downlink(Payloads(codecs, specs), tuple(remembers and one for one in takes))


def _squared_norm(arrays: Sequence[jax.Array]) -> jax.Array:
    return optax.tree.norm(list(arrays), squared=True)
