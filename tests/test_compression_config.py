"""`gradient_compression:` what it takes, what it refuses, and the codecs and programs that come of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxdist import codecs
from jaxdist.codecs import error_feedback as memories
from jaxdist.codecs.build import Stage, choose, codec_of, feedback_of, feeds_back, stages
from jaxdist.config import compression as options
from jaxdist.config.base import Target
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.yaml_file import dump_yaml, parse_yaml
from jaxdist.leaves import Leaf, is_leaf

MINIMAL = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "optimizer": {"kind": "sgd"}}
BLOCKS = [
    options.BF16, options.FP16, options.FP8, options.Int8, options.Int4, options.QSGD, options.TernGrad, options.Sign,
    options.MajorityVote, options.TopK, options.ExactTopK, options.Threshold, options.RandomK, options.PowerSGD,
]  # fmt: skip


def compression(text: str, *overrides: str) -> GradientCompression:
    block = parse_yaml(text, "test")
    return load({**MINIMAL, "gradient_compression": block}, list(overrides)).config.gradient_compression


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compression(text, *overrides)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


def leaves_and_shards() -> tuple[Any, Any]:
    """Two stacked matrices [3, 64, 32], their biases and norms, and an embedding."""
    leaves = {
        "blocks": {
            "up": {
                "kernel": Leaf("blocks/up/kernel", "matrix", (3, 64, 32), jnp.float32, 1),
                "bias": Leaf("blocks/up/bias", "bias", (3, 32), jnp.float32, 1),
            },
            "down": {"kernel": Leaf("blocks/down/kernel", "matrix", (3, 64, 32), jnp.float32, 1)},
            "norm": {"scale": Leaf("blocks/norm/scale", "norm", (3, 32), jnp.float32, 1)},
        },
        "token_embedding": Leaf("token_embedding", "embedding", (256, 32), jnp.float32),
    }
    shards = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves, is_leaf=is_leaf)
    return leaves, shards


def chosen(text: str) -> dict[str, Any]:
    """The codec of each parameter by name, in the last program of the run."""
    block = compression(text)
    leaves, shards = leaves_and_shards()
    names = [leaf.name for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf)]
    found = choose(stages(block)[-1], leaves, shards, block.error_feedback)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.model_fields["kind"].default)
def test_a_codec_has_the_same_defaults_in_the_config_and_in_python(block):
    built = codec_of(block(), "up")
    arguments = {"scaled": False} if isinstance(built, codecs.RandomK) else {}
    assert built == type(built)(**arguments)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.model_fields["kind"].default)
def test_every_argument_of_a_codec_can_be_given_in_the_config(block):
    arguments = {field.name for field in dataclasses.fields(codec_of(block(), "up")) if field.init}
    named_elsewhere = {"exchange", "unbiased", "stacked", "scaled"} | ({"block"} - set(block.model_fields))
    assert arguments - named_elsewhere <= set(block.model_fields)


def test_a_block_survives_being_written_out_in_full_and_read_back():
    text = """
        up: {kind: topk, ratio: 0.001, warmup_steps: 40}
        error_feedback: {kind: ef, momentum: 0.9, clip_norm: 1.0}
        policy: [{embedding: {kind: exact_topk}}, {'kernel$': {kind: none}}]
        dense_steps: 10
    """
    block = compression(text)
    assert compression(dump_yaml(block.model_dump(mode="json"))) == block
    assert list(block.policy[0]) == ["embedding"]


def test_compression_is_part_of_what_makes_two_runs_the_same():
    plain, compressed = load(MINIMAL).config, load(MINIMAL, ["gradient_compression.up.kind=int8"]).config
    assert plain.identity() != compressed.identity()
    other = ["gradient_compression.up={kind: int8, block: 128}"]
    assert load(MINIMAL, other).config.identity() != compressed.identity()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("up: {kind: topk, ratio: 1.0}", "up.ratio: must be above 0 and below 1, got 1.0"),
        ("up: {kind: topk, ratio: 0}", "up.ratio: must be above 0 and below 1, got 0"),
        ("up: {kind: threshold, sample: -1}", "up.sample: must be above 0 and below 1, got -1"),
        ("up: {kind: topk, ratio: x}", "up.ratio: should be a valid number, got 'x'"),
        ("up: int8", "up: must be a mapping with a kind, got 'int8': write {kind: int8}"),
        ("down: int8", "down: must be a mapping with a kind, got 'int8': write {kind: int8}"),
        ("policy: [{x: int8}]", "policy.0.x: must be a mapping with a kind, got 'int8': write {kind: int8}"),
        ("up: {kind: powersgd, rank: 0}", "up.rank: should be greater than 0"),
        ("up: {kind: qsgd, bits: 3}", "up.bits: 3 is not allowed"),
        ("up: {kind: topkk}", "did you mean topk?"),
        ("up: {kind: int8, blocks: 3}", "did you mean block?"),
        ("up: {kind: topk, ratio: 0.3, warmup_steps: 9}", "warmup_steps has no effect: it begins at 25%"),
        ("up: {kind: topk, ratio: 0.001, warmup_steps: 3}", "must be at least 4, its stages"),
        ("error_feedback: true", "error_feedback has no effect: up compresses nothing"),
        ("dense_steps: 5", "dense_steps has no effect: up compresses nothing"),
        ("policy: [{kernel: {kind: none}}]", "policy has no effect: up compresses nothing"),
        ("{up: {kind: majority_vote}, error_feedback: true}", "error_feedback: up is majority_vote"),
        (
            "{up: {kind: int8}, policy: [{x: {kind: majority_vote}}], error_feedback: {kind: ef21}}",
            "error_feedback: policy.0.x is majority_vote",
        ),
        (
            "up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: majority_vote}}",
            "up: adaptive has majority_vote beside another codec",
        ),
        ("{up: {kind: int8}, error_feedback: {kind: ef, momentum: 0.9}}", "error_feedback.momentum: up is int8"),
        (
            "{up: {kind: adaptive, gentle: {kind: topk}, strong: {kind: powersgd}}, "
            "error_feedback: {kind: ef, momentum: 0.9}}",
            "error_feedback.momentum: up.strong is powersgd",
        ),
        (
            "{up: {kind: topk}, policy: [{x: {kind: sign}}], error_feedback: {kind: ef, momentum: 0.9}}",
            "error_feedback.momentum: policy.0.x is sign",
        ),
        (
            "{up: {kind: topk}, error_feedback: {kind: ef, clip_norm: 1.0}}",
            "clip_norm has no effect without momentum",
        ),
        ("{up: {kind: topk}, error_feedback: {kind: ef, momentum: 1.0}}", "momentum: should be less than 1"),
        ("{up: {kind: topk}, policy: [{x: {kind: none}}, {'(x': {kind: none}}]}", "rule 1: '(x' is no regular"),
        (
            "{up: {kind: topk}, policy: [{x: {kind: none}, y: {kind: none}}]}",
            "rule 0: must be one `pattern: codec`, got 2",
        ),
        (
            "{up: {kind: topk}, policy: [{x: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}}}]}",
            "adaptive chooses for the whole model",
        ),
        (
            "up: {kind: adaptive, gentle: {kind: adaptive}, strong: {kind: sign}}",
            "up.gentle: adaptive chooses for the whole model",
        ),
        ("down: {kind: adaptive}", "down: adaptive chooses for the whole model"),
        ("up: {kind: adaptive, gentle: int8, strong: {kind: sign}}", "up.gentle: must be a mapping with a kind"),
        (
            "up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}, interval: 1}",
            "up.interval: should be greater than or equal to 2",
        ),
        (
            "up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: int8}}",
            "gentle and strong are the same codec",
        ),
        (
            "up: {kind: adaptive, gentle: {kind: topk, ratio: 0.1, warmup_steps: 5}, strong: {kind: topk}}",
            "gentle.warmup_steps: adaptive begins with the gentle codec",
        ),
        (
            "{up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}}, "
            "policy: [{x: {kind: topk, warmup_steps: 9}}]}",
            "policy.0.x.warmup_steps: stands beside up: adaptive",
        ),
    ],
)
def test_what_makes_no_sense_or_has_no_effect_in_the_block_is_refused(text: str, expected: str):
    assert expected in problem(text)


@pytest.mark.parametrize("given", ["ef21", "3", "{momentum: 0.9}", "{kind: eff}", "{target: 'a:b'}"])
def test_what_is_neither_a_switch_nor_a_kind_of_error_feedback_is_told_all_that_is(given: str):
    expected = "error_feedback: must be true, false, {kind: ef} or {kind: ef21}, got"
    assert expected in problem(f"{{up: {{kind: topk}}, error_feedback: {given}}}")


@pytest.mark.parametrize(
    "override", ["policy=[{'(x': {kind: none}}]", "up=int8", "up.ratio=2", "error_feedback=ef21", "up.gentle=int8"]
)
def test_a_mistake_is_told_with_the_override_that_made_it(override: str):
    block = "up: {kind: topk}"
    if "gentle" in override:
        block = "up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}}"
    assert problem(block, f"gradient_compression.{override}").endswith("  [command line]")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("up: {kind: int8}", ["strategy.mesh.data=1"], "up: has no effect with strategy.mesh.data: 1"),
        ("up: {kind: int8}", ["strategy={target: 'a:b'}"], "no effect on a strategy of your own"),
        ("down: {kind: int8}", ["strategy={target: 'a:b'}"], "no effect on a strategy of your own"),
        ("{up: {kind: int8}, dense_steps: 100}", [], "100 leave nothing to compress, the budget ends after 100"),
        (
            "{up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}, interval: 40}, dense_steps: 60}",
            [],
            "up.interval: 40 is too long, the strong codec is used from step 140 on at best",
        ),
        (
            "{up: {kind: int8}, dense_steps: 4}",
            ["train={budget: {samples: 121}, global_batch_size: 32}"],
            "the budget ends after 4",
        ),
        ("{}", ["telemetry.compression_every=10"], "telemetry.compression_every: has no effect without"),
        (
            "{up: {kind: topk}, error_feedback: {kind: ef, momentum: 0.9}}",
            ["telemetry.compression_every=10"],
            "telemetry.compression_every: has no effect with gradient_compression.error_feedback.momentum",
        ),
        ("down: {kind: int8}", [], "down: has no effect with strategy.mesh.fsdp: 1"),
        (
            "down: {kind: topk}",
            ["strategy.mesh.fsdp=2"],
            "topk is not for parameters; allowed under sync: none, bf16",
        ),
        (
            "down: {kind: int4, rounding: stochastic}",
            ["strategy.mesh.fsdp=2"],
            "down.rounding: parameters are rounded",
        ),
        ("down: {kind: bf16}", ["strategy.mesh.fsdp=2", "train.precision=bf16"], "which gathers 16 bits already"),
        (
            "{up: {kind: topk}, error_feedback: {kind: ef, momentum: 0.9}}",
            ["optimizer.kind=momentum"],
            "momentum: is momentum already, which optimizer.kind momentum would add to",
        ),
    ],
)
def test_what_does_not_go_with_another_block_is_refused(text: str, overrides: list[str], expected: str):
    assert expected in problem(text, *overrides)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("up: {kind: int8}", ["strategy.mesh.data=4"]),
        ("{up: {kind: int8}, down: {kind: int8}}", ["strategy.mesh.fsdp=2"]),
        ("{up: {kind: int8}, dense_steps: 5}", ["run.elastic=shrink"]),
        ("{up: {kind: topk}, error_feedback: false}", []),
        ("{up: {kind: majority_vote}, error_feedback: false}", []),
        ("{up: {kind: topk}, error_feedback: {kind: ef, momentum: 0.9, clip_norm: 1.0}}", []),
        (
            "{up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: majority_vote}}, error_feedback: false}",
            ["train.budget.steps=1000"],
        ),
        (
            "{up: {kind: randomk}, policy: [{a: {kind: threshold}}, {b: {kind: none}}, {c: {target: 'a:b'}}], "
            "error_feedback: {kind: ef, momentum: 0.9}}",
            [],
        ),
        ("{up: {kind: int8}, dense_steps: 3}", ["train={budget: {samples: 121}, global_batch_size: 32}"]),
        ("{up: {kind: int8}, dense_steps: 100}", ["train.budget={epochs: 1}"]),
        ("up: {kind: int8}", ["telemetry.compression_every=10"]),
        ("{}", ["telemetry.compression_every=null"]),
        ("policy: [{kernel: {kind: sign}}]", []),
        ("error_feedback: null", ["strategy={target: 'a:b'}"]),
    ],
)
def test_what_makes_sense_is_taken(text: str, overrides: list[str]):
    assert isinstance(compression(text, *overrides), options.GradientCompression)


def test_up_leaves_norms_and_biases_alone_and_powersgd_learns_which_dimensions_count_layers():
    found = chosen("up: {kind: powersgd, rank: 2}")
    assert found["blocks/norm/scale"] is None
    assert found["blocks/up/bias"] is None
    assert found["blocks/up/kernel"] == codecs.PowerSGD(rank=2, stacked=1)
    assert found["token_embedding"] == codecs.PowerSGD(rank=2, stacked=0)


def test_the_first_rule_whose_expression_is_found_in_the_name_decides():
    found = chosen(
        "{up: {kind: int8}, policy: [{'up/': {kind: sign}}, {'kernel$': {kind: none}}, {'norm': {kind: int4}}]}"
    )
    assert found == {
        "blocks/up/kernel": codecs.Sign(),
        "blocks/up/bias": codecs.Sign(),  # a rule is for what it names, whatever its kind
        "blocks/down/kernel": None,
        "blocks/norm/scale": codecs.Int4(),
        "token_embedding": codecs.Int8(),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{up: {kind: int8}, policy: [{nothing_like_it: {kind: none}}]}",
            "no parameter matches (--explain prints all)",
        ),
        (
            "{up: {kind: int8}, policy: [{kernel: {kind: none}}, {'up/kernel': {kind: sign}}]}",
            "earlier rules take all",
        ),
        ("{up: {kind: powersgd, rank: 500}}", "make none of this model's parameters smaller"),
        ("{up: {kind: qsgd, bits: 2}, error_feedback: true}", "is no contraction"),
        ("{up: {kind: terngrad}, error_feedback: {kind: ef21}}", "is no contraction"),
    ],
)
def test_what_has_no_effect_or_does_harm_on_this_model_is_refused(text: str, expected: str):
    with pytest.raises(UserError, match="gradient_compression") as caught:
        chosen(text)
    assert expected in str(caught.value)


def test_error_feedback_is_on_by_default_where_a_codec_is_biased_and_its_error_bounded():
    on = {block.model_fields["kind"].default: feeds_back(codec_of(block(), "up"), None) for block in BLOCKS}
    assert {kind for kind in on if not on[kind]} == {"qsgd", "terngrad", "majority_vote"}


def test_random_k_is_scaled_only_where_nothing_is_fed_back():
    block = options.RandomK(ratio=0.1)
    assert codec_of(block, "up", error_feedback=False).unbiased
    for fed_back in (None, True, options.EF21()):
        assert not codec_of(block, "up", fed_back).unbiased


def test_what_error_feedback_asks_for_is_what_is_built():
    sent = (codecs.BlockTopK(), None)
    assert feedback_of(None, sent) == feedback_of(True, sent) == memories.ErrorFeedback()
    assert feedback_of(None, (codecs.Int8(rounding="stochastic"), None)) == memories.NoFeedback()
    assert feedback_of(False, sent) == memories.NoFeedback()
    assert feedback_of(options.EF21(), sent) == memories.EF21()
    block = options.ErrorFeedback(momentum=0.9, clip_norm=2.0)
    assert feedback_of(block, sent) == memories.ErrorFeedback(0.9, 2.0)


def test_the_ratio_falls_by_fours_in_stages_of_equal_length_after_the_dense_steps():
    found = stages(compression("{up: {kind: topk, ratio: 0.001, warmup_steps: 40}, dense_steps: 10}"))
    assert [(stage.name, stage.first_step) for stage in found] == [
        ("dense", 0), ("warmup_1", 10), ("warmup_2", 20), ("warmup_3", 30), ("warmup_4", 40), ("compressed", 50),
    ]  # fmt: skip
    assert [stage.up.ratio for stage in found[1:]] == [0.25, 0.0625, 0.015625, 0.00390625, 0.001]


def test_rules_of_a_policy_warm_up_each_at_their_own_pace():
    found = stages(
        compression(
            "{up: {kind: topk, ratio: 0.05, warmup_steps: 8}, "
            "policy: [{a: {kind: randomk, ratio: 0.1, warmup_steps: 6}}, {b: {kind: int8}}]}"
        )
    )
    at = [(stage.first_step, stage.up.ratio, stage.policy[0][1].ratio) for stage in found]
    assert at == [(0, 0.25, 0.25), (4, 0.0625, 0.25), (6, 0.0625, 0.1), (8, 0.05, 0.1)]


def test_an_adaptive_codec_has_two_programs_and_begins_with_the_gentle_one():
    text = "{up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: sign}, interval: 10}, dense_steps: 3}"
    assert [(stage.name, stage.first_step, stage.up.kind) for stage in stages(compression(text))] == [
        ("dense", 0, "none"), ("gentle", 3, "int8"), ("strong", None, "sign"),
    ]  # fmt: skip


def test_nothing_compressed_is_one_dense_program():
    leaves, shards = leaves_and_shards()
    (stage,) = stages(GradientCompression())
    assert stage == Stage("dense", 0, options.NoCompression())
    assert set(choose(stage, leaves, shards)) == {None}


class Half:
    """No codec: has neither encode nor decode."""

    block, exchange, unbiased = 1, "two_phase", False


@dataclasses.dataclass(frozen=True)
class Named(codecs.Int8):
    """A user's own: everything of int8, and an exchange that may be wrong."""

    exchange: Any = "two_phase"


def test_a_users_own_codec_is_called_with_its_arguments_and_must_keep_the_protocol():
    def own(name: str, **arguments: Any) -> Any:
        return codec_of(Target(target=f"{__name__}:{name}", **arguments), "gradient_compression.up")

    assert own("Named", block=64) == Named(block=64)
    with pytest.raises(UserError, match="it lacks contraction, takes, init, encode, decode"):
        own("Half")
    with pytest.raises(UserError, match="exchange 'pigeons'; allowed: two_phase, gather, sum"):
        own("Named", exchange="pigeons")
    with pytest.raises(UserError, match="takes no blok"):
        own("Named", blok=64)


def test_arguments_that_only_the_codec_can_check_are_told_by_their_place():
    with pytest.raises(UserError, match=r"gradient_compression\.up: "):
        codec_of(options.Int4(block=255), "gradient_compression.up")
