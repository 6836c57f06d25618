"""Hugging Face directories: what is read is what lies there, what is written is what transformers loads."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxdist.config.errors import UserError
from jaxdist.config.model import Transformer
from jaxdist.leaves import path_name
from jaxdist.models.transformer import TransformerTask
from jaxdist.pretrained import check_pretrained, read_pretrained, shape_from_config, write_pretrained
from jaxdist.pretrained import read as reading

V, T = 50, 16
GPT2 = {"layers": 2, "width": 32, "heads": 4, "context": T}
LLAMA = {
    **GPT2, "kv_heads": 2, "mlp_width": 48, "norm": "rmsnorm", "positions": "rope", "activation": "swiglu",
    "bias": False, "tied_embedding": False, "rope_theta": 500.0,
    "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8},
}  # fmt: skip
BOTH = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
FORMS = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "stacked"])


def values(shape: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return Transformer(**{**shape, **changes}).model_dump()


def task_of(model: dict[str, Any], vocabulary: int = V) -> TransformerTask:
    return TransformerTask(vocabulary, **{k: v for k, v in model.items() if k not in ("kind", "init_from")})


def random_params(model: dict[str, Any], vocabulary: int = V) -> Any:
    """Every number is another, biases and scales too."""
    draws = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(task_of(model, vocabulary).init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.3 * draws.standard_normal(x.shape, np.float32), shapes)
    return params


def like(model: dict[str, Any], specs: Any = lambda name: PartitionSpec(), vocabulary: int = V) -> Any:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    shapes, _ = jax.eval_shape(task_of(model, vocabulary).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs(path_name(path)))),
        shapes,
    )


def one_layer_each(params: Any, layers: int = 2) -> Any:
    if "0" in params["blocks"]:
        return params
    return {**params, "blocks": {str(i): jax.tree.map(lambda x: x[i], params["blocks"]) for i in range(layers)}}  # noqa: B023


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A directory that holds GPT2's shape."""
    write_pretrained(random_params(values(GPT2)), values(GPT2), V, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# Without torch


@BOTH
@pytest.mark.parametrize("written", [False, True], ids=["from_unrolled", "from_stacked"])
@FORMS
def test_what_was_written_is_read_bit_for_bit_in_either_form(shape, written, scan, tmp_path):
    model = values(shape, scan_layers=written)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf", max_file_bytes=9000)
    assert len(list(tmp_path.glob("hf/model-*.safetensors"))) > 3
    model = values(shape, scan_layers=scan)
    assert_equal(one_layer_each(read_pretrained(tmp_path / "hf", model, V, like(model))), one_layer_each(params))


def column_of_query_key_value(x_BxTxD: np.ndarray, kernel: np.ndarray, model: dict[str, Any]) -> np.ndarray:
    """[B, T, G, R + 2, K], as the model sees it."""
    G = model["kv_heads"] or model["heads"]
    return (x_BxTxD @ kernel).reshape(*x_BxTxD.shape[:-1], G, model["heads"] // G + 2, -1)


@BOTH
def test_queries_keys_and_values_lie_where_the_classes_look_for_them(shape, tmp_path):
    model = values(shape)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    x_BxTxD = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)
    mixed = column_of_query_key_value(x_BxTxD, params["blocks"]["1"]["query_key_value"]["kernel"], model)
    query, key, value = mixed[..., :-2, :].reshape(2, 3, -1), mixed[..., -2, :], mixed[..., -1, :]
    if shape is GPT2:  # Conv1D [in, out], split in three
        theirs = np.split(x_BxTxD @ tensors["transformer.h.1.attn.c_attn.weight"], 3, axis=-1)
    else:  # Linear [out, in] each
        theirs = [x_BxTxD @ tensors[f"model.layers.1.self_attn.{p}_proj.weight"].T for p in "qkv"]
    for ours, other in zip((query, key, value), theirs, strict=True):
        np.testing.assert_allclose(ours.reshape(2, 3, -1), other, rtol=1e-5, atol=1e-6)


def sharded(name: str) -> PartitionSpec:
    """fsdp over the first dimension of a layer's matrix, tensor over its second."""
    layer = (None,) if name.startswith("blocks/") and not name.split("/")[1].isdecimal() else ()
    return PartitionSpec(*layer, "fsdp", "tensor") if name.endswith(("kernel", "embedding")) else PartitionSpec()


@BOTH
@FORMS
def test_each_shard_reads_its_own_slice_once_and_nothing_else(shape, scan, tmp_path, monkeypatch):
    model = values(shape, scan_layers=scan)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf")
    opened = []
    monkeypatch.setattr(reading, "TensorFiles", lambda *a: opened.append(TensorFiles(*a)) or opened[-1])
    found = read_pretrained(tmp_path / "hf", model, V, like(model, sharded))
    assert_equal(found, params)
    assert opened[0].bytes_read == sum(x.nbytes for x in jax.tree.leaves(params))  # not 8 times, not whole tensors


TensorFiles = reading.TensorFiles


@BOTH
def test_a_process_that_holds_one_device_reads_one_devices_share(shape, tmp_path):
    model = values(shape)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf")
    files, recipes = reading._open(tmp_path / "hf", model, V, like(model))
    share = 0
    for path, x in jax.tree_util.tree_leaves_with_path(like(model, sharded)):
        read = reading._reader(path_name(path), recipes, x.dtype, files)
        index = x.sharding.devices_indices_map(x.shape)[jax.devices()[3]]
        whole = one_layer_each(params)
        for key in path:
            whole = whole[key.key]
        np.testing.assert_array_equal(read(index), whole[index])
        share += whole[index].nbytes
    assert files.bytes_read == share


def test_padding_of_the_vocabulary_is_zero_where_read_and_left_out_where_written(tmp_path):
    plain, padded = values(LLAMA), values(LLAMA, pad_vocabulary=64)
    params = random_params(plain)
    write_pretrained(params, plain, V, tmp_path / "plain")
    found = read_pretrained(tmp_path / "plain", padded, V, like(padded))
    for matrix_VxD in (found["token_embedding"]["embedding"], found["head"]["kernel"].T):
        assert matrix_VxD.shape[0] == 64
        assert not np.any(matrix_VxD[V:])
    noisy = jax.tree.map(np.asarray, found)
    noisy["token_embedding"]["embedding"] = np.where(
        np.arange(64)[:, None] < V, found["token_embedding"]["embedding"], 7
    )
    write_pretrained(noisy, padded, V, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert_equal(one, two)


def test_rows_of_a_vocabulary_that_the_file_rounded_up_fill_the_padding(tmp_path):
    model = values(LLAMA)
    params = random_params(model, 64)
    write_pretrained(params, model, 64, tmp_path / "hf")
    padded = values(LLAMA, pad_vocabulary=64)
    assert_equal(read_pretrained(tmp_path / "hf", padded, V, like(padded)), params)


@BOTH
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_weights_become_fp32_masters_of_the_same_value(shape, dtype, tmp_path):
    model = values(shape)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda t: t.update({name: x.astype(dtype) for name, x in t.items()}))
    found = read_pretrained(tmp_path / "hf", model, V, like(model))
    assert_equal(found, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))


def test_a_shorter_context_takes_the_first_positions_and_says_so(gpt2, caplog):
    model = values(GPT2, context=10)
    with caplog.at_level(logging.INFO):
        found = read_pretrained(gpt2, model, V, like(model))
    table = load_file(gpt2 / "model.safetensors")["transformer.wpe.weight"]
    np.testing.assert_array_equal(found["position_embedding"]["embedding"], table[:10])
    assert "of 16 positions the first 10" in caplog.text


def test_names_without_prefix_and_saved_mask_buffers_are_read_too(gpt2):
    def as_on_the_hub(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, T, T), np.float32)

    edit_tensors(gpt2, as_on_the_hub)
    assert_equal(read_pretrained(gpt2, values(GPT2), V, like(values(GPT2))), random_params(values(GPT2)))


@BOTH
def test_the_shape_of_a_directory_is_the_block_that_fits_it(shape, tmp_path):
    write_pretrained(random_params(values(shape)), values(shape), V, tmp_path / "hf")
    block = Transformer(**shape_from_config(tmp_path / "hf")).model_dump()
    check_pretrained(tmp_path / "hf", block, V, like(block))


def test_a_model_without_biases_is_a_gpt2_whose_biases_are_zero(tmp_path):
    model, with_bias = values(GPT2, bias=False, layers=1), values(GPT2, layers=1)
    params = random_params(model)
    write_pretrained(params, model, V, tmp_path / "hf")
    found = read_pretrained(tmp_path / "hf", with_bias, V, like(with_bias))
    tokens = {"tokens": jnp.arange(T)[None] % V}
    np.testing.assert_allclose(
        jax.jit(task_of(with_bias).predict)(found, {}, tokens),
        jax.jit(task_of(model).predict)(params, {}, tokens),
        atol=1e-6,
    )


# Refused


def test_every_field_that_differs_is_named_with_what_would_fit(gpt2):
    model = values(LLAMA, layers=3, norm_eps=1e-6)
    with pytest.raises(UserError) as refused:
        read_pretrained(gpt2, model, 256, like(model, vocabulary=256))
    message = str(refused.value)
    assert message.startswith(f"model.init_from: {gpt2} holds another model")
    for expected in (
        "model.layers: 3, must be 2",
        "model.kv_heads: 2, must be 4",
        "model.mlp_width: 48, must be 128",
        "model.norm: rmsnorm, must be layernorm",
        "model.norm_eps: 1e-06, must be 1e-05",
        "model.positions: rope, must be learned",
        "model.activation: swiglu, must be gelu",
        "model.bias: false, must be true",
        "model.tied_embedding: false, must be true",
        "vocabulary is 256, must be 50",
        "model: {kind: transformer, layers: 2, width: 32,",
    ):
        assert expected in message, message
    assert "model.width" not in message


def test_rotary_choices_that_differ_are_refused(tmp_path):
    write_pretrained(random_params(values(LLAMA)), values(LLAMA), V, tmp_path / "hf")
    model = values(LLAMA, rope_theta=10_000.0, rope_scaling={**LLAMA["rope_scaling"], "factor": 8.0})
    with pytest.raises(UserError, match=r"(?s)rope_theta: 10000.0, must be 500.0.*rope_scaling: \{factor: 8.0.*4.0"):
        check_pretrained(tmp_path / "hf", model, V, like(model))
    edit(tmp_path / "hf", rope_scaling=None)
    with pytest.raises(UserError, match="rope_scaling: must be null"):
        check_pretrained(tmp_path / "hf", values(LLAMA), V, like(values(LLAMA)))


def test_a_longer_context_than_the_file_has_is_refused(gpt2):
    model = values(GPT2, context=32)
    with pytest.raises(UserError, match=r"model\.context: 32, must be at most 16"):
        check_pretrained(gpt2, model, V, like(model))


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def index_of(file: str) -> Any:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "part.safetensors")
        text = json.dumps({"weight_map": {"transformer.wte.weight": file}})
        (directory / "model.safetensors.index.json").write_text(text)

    return write


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config no json": (lambda d: (d / "config.json").write_text("{"), "JSON object"),
    "other model": (lambda d: edit(d, model_type="mistral"), "model_type is 'mistral'; weights are read of gpt2 and"),
    "relu": (lambda d: edit(d, activation_function="relu"), "activation_function is 'relu', must be 'gelu_new'"),
    "no size": (lambda d: edit(d, n_embd="wide"), "n_embd must be a positive whole number, it is 'wide'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "only pickles": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "there is pytorch_model.bin: save the model again",
    ),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "broken header": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "not a whole safetensors file"),
    "truncated": (cut, "not a whole safetensors file"),
    "missing": (lambda d: edit_tensors(d, lambda t: t.pop("transformer.h.1.ln_1.bias")), "1 missing: h.1.ln_1.bias"),
    "unknown": (lambda d: edit_tensors(d, lambda t: t.update(lora=np.ones(2, np.float32))), "1 unknown: lora"),
    "other shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"transformer.ln_f.bias": np.ones(31, np.float32)})),
        r"1 of another shape: ln_f.bias \[31\] \(must be \[32\]\)",
    ),
    "int8": (
        lambda d: edit_tensors(d, lambda t: t.update({"transformer.ln_f.bias": np.ones(32, np.int8)})),
        "ln_f.bias is of type I8; weights are read as F32, F16, BF16",
    ),
    "index of nothing": (index_of("other.safetensors"), "names other.safetensors, which is no file"),
    "index elsewhere": (index_of("../x.safetensors"), r"names ../x.safetensors, which is no file"),
    "index no json": (lambda d: index_of("x")(d) or (d / reading_index).write_text("[]"), "not an index"),
}
reading_index = "model.safetensors.index.json"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_foreign_or_damaged_directory_is_refused(damage, gpt2):
    do, message = DAMAGE[damage]
    do(gpt2)
    with pytest.raises(UserError, match=rf"(?s)^model\.init_from: (?!model\.init_from).*{message}"):
        read_pretrained(gpt2, values(GPT2), V, like(values(GPT2)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_dim": 16}, "head_dim is 16, must be 8"),
        ({"mlp_bias": True}, "mlp_bias is True, must be False"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type is 'yarn', must be 'default' or 'llama3'",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor must be a positive number"),
        ({"rope_scaling": "llama3"}, "config.json"),
    ],
)
def test_a_llama_that_no_block_can_say_is_refused(config, message, tmp_path):
    write_pretrained(random_params(values(LLAMA)), values(LLAMA), V, tmp_path / "hf")
    edit(tmp_path / "hf", **config)
    with pytest.raises(UserError, match=message):
        shape_from_config(tmp_path / "hf")


def test_a_model_between_the_classes_is_refused_with_each_ones_reason(tmp_path):
    model = values(GPT2, positions="rope", kv_heads=2)
    with pytest.raises(UserError) as refused:
        write_pretrained(random_params(model), model, V, tmp_path / "hf")
    assert "GPT2LMHeadModel needs positions: learned (is rope), kv_heads: 4 (is 2)" in str(refused.value)
    assert "LlamaForCausalLM needs norm: rmsnorm (is layernorm), activation: swiglu (is gelu)" in str(refused.value)


def test_a_directory_with_something_in_it_is_left_alone_and_an_empty_one_is_used(tmp_path):
    model = values(GPT2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_pretrained(random_params(model), model, V, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    write_pretrained(random_params(model), model, V, tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_every_file_written_has_the_mode_that_the_umask_leaves(umask, tmp_path):
    model = values(GPT2)
    before = os.umask(umask)
    try:
        write_pretrained(random_params(model), model, V, tmp_path / "hf", max_file_bytes=30_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("parent", ["/proc", "/proc/1/no", "file"])
def test_a_directory_that_cannot_be_made_is_refused_with_its_name(parent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{parent}/x: cannot be made: .*; give another directory"):
        write_pretrained(random_params(values(GPT2)), values(GPT2), V, f"{parent}/x")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = values(GPT2)
    monkeypatch.setattr("jaxdist.pretrained.write._write_json", full)
    with pytest.raises(OSError, match="No space"):
        write_pretrained(random_params(model), model, V, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


# Beside transformers


def hugging_face(shape: dict[str, Any]) -> Any:
    """A small model of transformers with random weights, biases and scales too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if shape is GPT2:
        config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=T)
        model = transformers.GPT2LMHeadModel(config)
    else:
        scaling = {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
        }  # fmt: skip
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=T, rms_norm_eps=1e-5, rope_parameters=scaling,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


TOKENS = np.random.default_rng(2).integers(0, V, (3, T))


@BOTH
@FORMS
def test_weights_of_transformers_give_the_logits_of_transformers(shape, scan, tmp_path):
    theirs = hugging_face(shape)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    model = values(shape, scan_layers=scan)
    params = read_pretrained(tmp_path / "hf", model, V, like(model, sharded))
    ours = jax.jit(task_of(model).predict)(jax.device_get(params), {}, {"tokens": TOKENS})
    np.testing.assert_allclose(ours, logits_of(theirs, TOKENS), atol=1e-4)


@BOTH
@FORMS
def test_transformers_loads_what_is_written_and_gives_our_logits(shape, scan, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = values(shape, scan_layers=scan, pad_vocabulary=8)
    params = random_params(model)
    name = write_pretrained(params, model, V, tmp_path / "hf", max_file_bytes=20_000)
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    ours = jax.jit(task_of(model).predict)(params, {}, {"tokens": TOKENS})
    np.testing.assert_allclose(ours, logits_of(loaded.eval(), TOKENS), atol=1e-4)


@BOTH
def test_weights_go_through_both_ways_bit_for_bit(shape, tmp_path):
    theirs = hugging_face(shape)
    theirs.save_pretrained(tmp_path / "hf")
    model = values(shape)
    params = read_pretrained(tmp_path / "hf", model, V, like(model))
    name = write_pretrained(params, model, V, tmp_path / "ours")
    import transformers

    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again[key].numpy(), tensor.numpy(), err_msg=key)
    again_read = read_pretrained(tmp_path / "ours", model, V, like(model))
    assert_equal(again_read, params)
