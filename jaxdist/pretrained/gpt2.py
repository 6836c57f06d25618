"""GPT-2 as Hugging Face's GPT2LMHeadModel stores it: kernels [in, out], query, key and value in one."""

import re
from typing import Any

from jaxdist.pretrained.fields import other_choices, positive, refused
from jaxdist.pretrained.recipe import Recipes, Run, head_runs, joined, vocabulary_runs, whole
from jaxdist.pretrained.shape import Shape

CLASS = "GPT2LMHeadModel"
PREFIX = "transformer."
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which older versions saved
NEEDS = {"norm": "layernorm", "positions": "learned", "activation": "gelu"}


def block(config: dict[str, Any]) -> dict[str, Any]:
    """The model block's fields. Raises UserError for a config.json that lacks a size."""
    width, heads = positive(config, "n_embd"), positive(config, "n_head")
    return {
        "layers": positive(config, "n_layer"),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "context": positive(config, "n_positions"),
        "mlp_width": 4 * width if config.get("n_inner") is None else positive(config, "n_inner"),
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tied_embedding": config.get("tie_word_embeddings", True),
    }


def unsupported(config: dict[str, Any]) -> list[str]:
    """Fields of config.json with a value that no model block can say."""
    return [
        *refused(config, "activation_function", "gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
        *refused(config, "scale_attn_weights", True),
        *refused(config, "scale_attn_by_inverse_layer_idx", False),
        *refused(config, "add_cross_attention", False),
    ]


def cannot_express(shape: Shape) -> list[str]:
    """Why this class cannot hold the model; nothing if it can. Biases that the model has not are zeros."""
    return other_choices(shape, {**NEEDS, "kv_heads": shape.heads})


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json; which tokens begin and end a text is the tokenizer's to know."""
    return {
        "architectures": [CLASS],
        "model_type": "gpt2",
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_positions": shape.context,
        "n_inner": shape.mlp_width,
        "vocab_size": shape.vocabulary,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embedding,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def recipes(shape: Shape) -> Recipes:
    D, F = shape.width, shape.mlp_width
    rows = shape.padded_vocabulary
    found = {
        "token_embedding/embedding": joined(vocabulary_runs("wte.weight", shape), rows, D, axis=0),
        "position_embedding/embedding": joined([Run("wpe.weight", 0, shape.context)], shape.context, D, axis=0),
    }
    for i in range(shape.layers):
        ours, theirs = f"blocks/{i}", f"h.{i}"
        attention = f"{theirs}.attn.c_attn"
        for norm, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            found[f"{ours}/{norm}/scale"] = whole(f"{theirs}.{name}.weight", D)
            found[f"{ours}/{norm}/bias"] = whole(f"{theirs}.{name}.bias", D)
        for leaf, name, lead in (("kernel", f"{attention}.weight", (D,)), ("bias", f"{attention}.bias", ())):
            runs = head_runs(shape, (name, 0), (name, D), (name, 2 * D))
            found[f"{ours}/query_key_value/{leaf}"] = joined(runs, *lead, 3 * D)
        for linear, name, inputs, outputs in (
            ("attention_out", "attn.c_proj", D, D),
            ("mlp_in", "mlp.c_fc", D, F),
            ("mlp_out", "mlp.c_proj", F, D),
        ):
            found[f"{ours}/{linear}/kernel"] = whole(f"{theirs}.{name}.weight", inputs, outputs)
            found[f"{ours}/{linear}/bias"] = whole(f"{theirs}.{name}.bias", outputs)
    found["final_norm/scale"], found["final_norm/bias"] = whole("ln_f.weight", D), whole("ln_f.bias", D)
    if not shape.tied_embedding:
        found["head/kernel"] = joined(vocabulary_runs("lm_head.weight", shape), D, rows, transposed=True)
    return found
