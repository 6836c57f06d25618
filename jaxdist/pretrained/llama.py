"""Llama as Hugging Face's LlamaForCausalLM stores it: kernels [out, in], RoPE by rotated halves."""

import re
from typing import Any

from jaxdist.pretrained.fields import other_choices, positive, refused
from jaxdist.pretrained.recipe import Recipes, head_runs, joined, vocabulary_runs, whole
from jaxdist.pretrained.shape import RopeScaling, Shape

CLASS = "LlamaForCausalLM"
PREFIX = "model."
BUFFERS = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # which older versions saved
NEEDS = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu"}
SCALING = {  # ours: theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


def block(config: dict[str, Any]) -> dict[str, Any]:
    """The model block's fields. Raises UserError for a config.json that lacks a size."""
    heads = positive(config, "num_attention_heads")
    return {
        "layers": positive(config, "num_hidden_layers"),
        "width": positive(config, "hidden_size"),
        "heads": heads,
        "kv_heads": heads if config.get("num_key_value_heads") is None else positive(config, "num_key_value_heads"),
        "context": positive(config, "max_position_embeddings"),
        "mlp_width": positive(config, "intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "positions": "rope",
        "rope_theta": _rope(config).get("rope_theta", 10000.0),
        "rope_scaling": _scaling(config),
        "activation": "swiglu",
        "bias": config.get("attention_bias", False),
        "tied_embedding": config.get("tie_word_embeddings", False),
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Since transformers 5 in one dictionary, before in two fields."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta")
    return {**({} if theta is None else {"rope_theta": theta}), **scaling}


def _rope_type(config: dict[str, Any]) -> str:
    rope = _rope(config)
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(config: dict[str, Any]) -> RopeScaling | None:
    if _rope_type(config) != "llama3":
        return None
    return {
        ours: positive(_rope(config), theirs, whole=ours == "original_context") for ours, theirs in SCALING.items()
    }


def unsupported(config: dict[str, Any]) -> list[str]:
    """Fields of config.json with a value that no model block can say."""
    width, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    return [
        *refused(config, "hidden_act", "silu"),
        *refused(config, "head_dim", None, width // heads),
        *refused(config, "mlp_bias", config.get("attention_bias", False)),
        *refused({"rope_type": _rope_type(config)}, "rope_type", "default", "llama3"),
    ]


def cannot_express(shape: Shape) -> list[str]:
    """Why this class cannot hold the model; nothing if it can."""
    return other_choices(shape, NEEDS)


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json; which tokens begin and end a text is the tokenizer's to know."""
    scaling = shape.rope_scaling
    return {
        "architectures": [CLASS],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_features,
        "intermediate_size": shape.mlp_width,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling
        and {"rope_type": "llama3", **{theirs: scaling[ours] for ours, theirs in SCALING.items()}},
        "attention_bias": shape.bias,
        "mlp_bias": shape.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied_embedding,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def recipes(shape: Shape) -> Recipes:
    D, F, rows = shape.width, shape.mlp_width, shape.padded_vocabulary
    embedding = vocabulary_runs("embed_tokens.weight", shape)
    found = {"token_embedding/embedding": joined(embedding, rows, D, axis=0)}
    for i in range(shape.layers):
        ours, theirs = f"blocks/{i}", f"layers.{i}"
        found[f"{ours}/attention_norm/scale"] = whole(f"{theirs}.input_layernorm.weight", D)
        found[f"{ours}/mlp_norm/scale"] = whole(f"{theirs}.post_attention_layernorm.weight", D)
        columns = (shape.heads + 2 * shape.kv_heads) * shape.head_features
        for leaf, last, lead in (("kernel", "weight", (D,)), ("bias", "bias", ())):
            query, key, value = (f"{theirs}.self_attn.{part}_proj.{last}" for part in "qkv")
            runs = head_runs(shape, (query, 0), (key, 0), (value, 0))
            found[f"{ours}/query_key_value/{leaf}"] = joined(runs, *lead, columns, transposed=leaf == "kernel")
        for linear, name, inputs, outputs in (
            ("attention_out", "self_attn.o_proj", D, D),
            ("mlp_in", "mlp.up_proj", D, F),
            ("mlp_gate", "mlp.gate_proj", D, F),
            ("mlp_out", "mlp.down_proj", F, D),
        ):
            found[f"{ours}/{linear}/kernel"] = whole(f"{theirs}.{name}.weight", inputs, outputs, transposed=True)
            found[f"{ours}/{linear}/bias"] = whole(f"{theirs}.{name}.bias", outputs)
    found["final_norm/scale"] = whole("norm.weight", D)
    if not shape.tied_embedding:
        found["head/kernel"] = joined(vocabulary_runs("lm_head.weight", shape), D, rows, transposed=True)
    return {name: recipe for name, recipe in found.items() if shape.bias or not name.endswith("bias")}
