"""Token files: made whole or not at all, read back exactly, refused when damaged."""

import errno
import importlib.util
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from jaxdist.config.errors import UserError
from jaxdist.data import tokenize as module
from jaxdist.data.tokenize import tokenize
from jaxdist.data.tokens import HEADER_BYTES, dtype_for, open_tokens, read_header, tokens

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None,
    reason="needs tokenizers: pip install 'jaxdist[tokenizers]'",
)
TEXT = "Grüße, the quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def test_bytes_round_trip(tmp_path, text_file):
    header = tokenize([text_file], tmp_path / "out.bin")
    assert (header.dtype, header.vocabulary, header.tokenizer) == ("uint16", 256, "bytes")
    assert header == read_header(tmp_path / "out.bin")
    assert bytes(open_tokens(tmp_path / "out.bin").astype(np.uint8)).decode() == TEXT


def test_long_files_are_read_in_pieces_without_a_seam(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    tokenize([text_file], tmp_path / "out.bin")
    assert bytes(open_tokens(tmp_path / "out.bin").astype(np.uint8)).decode() == TEXT


def test_separator_follows_every_file_and_widens_the_vocabulary(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 2)
    header = tokenize([str(tmp_path / "*.txt")], tmp_path / "out.bin", separator=256)
    assert open_tokens(tmp_path / "out.bin").tolist() == [97, 97, 256, 98, 98, 256]
    assert (header.vocabulary, header.separator) == (257, 256)


@needs_tokenizers
def test_byte_pair_encoding_round_trip(tmp_path, text_file, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    header = tokenize([text_file], tmp_path / "out.bin", str(tmp_path / "tokenizer.json"))
    ids = open_tokens(tmp_path / "out.bin").tolist()
    assert tokenizer.decode(ids) == TEXT
    assert ids == tokenizer.encode(TEXT).ids
    assert len(ids) < len(TEXT) / 2
    assert header.vocabulary == tokenizer.get_vocab_size()


@needs_tokenizers
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, text_file):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a Hugging Face"):
        tokenize([text_file], tmp_path / "out.bin", str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no tokenizer 'gpt9'"):
        tokenize([text_file], tmp_path / "out.bin", "gpt9")


def test_dtype_follows_the_vocabulary():
    assert [dtype_for(v) for v in (256, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, text_file):
    """A file size limit makes the system refuse the write half-way, as a full disk does."""
    output = tmp_path / "out.bin"
    output.write_bytes(b"the older file")
    program = (
        "import resource, signal, sys; from pathlib import Path; from jaxdist.data.tokenize import tokenize\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({HEADER_BYTES + 100}, {resource.RLIM_INFINITY}))\n"
        "try: tokenize([sys.argv[1]], Path(sys.argv[2]))\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, text_file, str(output)], check=False)
    assert done.returncode == errno.EFBIG
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "text.txt"]
    assert output.read_bytes() == b"the older file"


def test_a_damaged_source_leaves_nothing(tmp_path, text_file):
    with pytest.raises(UserError, match="no file matches"):
        tokenize([text_file, str(tmp_path / "none")], tmp_path / "out.bin")
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cut short or damaged"),
        (lambda content: content + b"x", "cut short or damaged"),
        (lambda content: content[:100], "damaged header"),
        (lambda content: b"", "not a token file"),
        (lambda content: b"GIF89a" + content, "not a token file"),
        (lambda content: content.replace(b'"uint16"', b'"uint99"'), "damaged header"),
        (lambda content: content.replace(b'"version": 1', b'"version": 9'), "version 9"),
        (lambda content: content.replace(b'"count"', b'"cuont"'), "damaged header"),
    ],
)
def test_a_damaged_token_file_is_named_with_what_is_wrong(tmp_path, text_file, damage, message):
    path = tmp_path / "out.bin"
    tokenize([text_file], path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as raised:
        tokens([str(path)], 8)
    assert str(path) in str(raised.value)


def test_token_files_are_windows_that_are_not_read_before_they_are_asked_for(tmp_path, text_file):
    tokenize([text_file], tmp_path / "a.bin")
    tokenize([text_file], tmp_path / "b.bin")
    source = tokens([str(tmp_path / "*.bin")], 16)
    assert isinstance(open_tokens(tmp_path / "a.bin"), np.memmap)
    per_file = (len(TEXT.encode()) - 1) // 16
    assert len(source) == 2 * per_file
    first, again = source.get(np.array([0, per_file]))["tokens"]
    np.testing.assert_array_equal(first, again)
    assert bytes(first.astype(np.uint8)) == TEXT.encode()[:17]


def test_token_files_of_different_tokenizers_do_not_mix(tmp_path, text_file):
    tokenize([text_file], tmp_path / "a.bin")
    tokenize([text_file], tmp_path / "b.bin", separator=256)
    with pytest.raises(UserError, match=r"b\.bin has vocabulary 257, .*a\.bin has 256"):
        tokens([str(tmp_path / "*.bin")], 16)
