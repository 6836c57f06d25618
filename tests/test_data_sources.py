"""Each source on small files made here: what it reads, and what it says of files that it cannot read."""

import gzip
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from source_checks import assert_rows_are_as_described, everything, needs

from jaxdist.config.errors import UserError
from jaxdist.data import idx, synthetic
from jaxdist.data.arrays import digits, npz
from jaxdist.data.baselines import token_windows, unigram_and_bigram
from jaxdist.data.extras import require
from jaxdist.data.python_stdlib import python_stdlib, stdlib_bytes
from jaxdist.data.stream import Stream
from jaxdist.data.text import text
from jaxdist.data.tokenize import tokenize
from jaxdist.data.tokens import tokens
from jaxdist.data.windows import TokenWindows

# Windows of tokens


def test_windows_predict_every_token_but_the_first_exactly_once():
    tokens = np.arange(23, dtype=np.uint16)
    windows = everything(TokenWindows([tokens], 5, 23))["tokens"]
    assert windows.shape == (4, 6)
    assert windows[:, 1:].ravel().tolist() == list(range(1, 21))
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])


def test_windows_do_not_span_sequences():
    first, second = np.arange(10, dtype=np.uint16), np.arange(100, 111, dtype=np.uint16)
    source = TokenWindows([first, np.arange(2, dtype=np.uint16), second], 4, 200)
    assert_rows_are_as_described(source)
    windows = source.get(np.array([3, 0, 2, 1]))["tokens"]
    assert windows.tolist() == [
        [104, 105, 106, 107, 108],
        [0, 1, 2, 3, 4],
        [100, 101, 102, 103, 104],
        [4, 5, 6, 7, 8],
    ]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match=r"4 tokens .* do not fill one window of 4 \+ 1"):
        TokenWindows([np.arange(4, dtype=np.uint8)], 4, 256)


def test_text_reads_files_and_globs_in_sorted_order_each_once(tmp_path):
    (tmp_path / "b.txt").write_text("world")
    (tmp_path / "a.txt").write_text("hello ")
    source = text([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], 10)
    assert everything(source)["tokens"].tobytes() == b"hello world"
    assert source.vocabulary == 256


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*none\.txt"):
        text([str(tmp_path / "none.txt")], 4)


def test_segment_ids_say_which_tokens_of_a_window_are_of_one_document():
    rng, lengths = np.random.default_rng(0), [4, 9, 1, 30, 3, 2, 23, 2]
    documents = [rng.integers(1, 9, n).astype(np.uint16) for n in lengths]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    by_place = TokenWindows([documents[0], np.concatenate(documents)], 6, 9, documents=[starts[:1], starts])
    ended = [np.append(document, 0).astype(np.uint16) for document in documents]
    by_separator = TokenWindows([np.concatenate(ended)], 6, 9, documents=0)
    for source, owners in ((by_place, owner), (by_separator, np.repeat(np.arange(len(lengths)), np.add(lengths, 1)))):
        assert_rows_are_as_described(source)
        found = everything(source)["segment_ids"]
        assert found.shape == (len(source), 7)
        for i, ids in enumerate(found):
            own = owners[6 * i : 6 * i + 7]
            np.testing.assert_array_equal(ids[:, None] == ids, own[:, None] == own)
    assert "segment_ids" not in TokenWindows([np.concatenate(documents)], 6, 9).features


def test_files_of_text_and_of_the_standard_library_are_documents(tmp_path: Path):
    for name, content in (("a", "one\n"), ("b", ""), ("c", "three\n")):
        (tmp_path / name).write_text(content)
    rows = everything(text([str(tmp_path / "*")], 9, separate_documents=True))
    assert rows["segment_ids"].tolist() == [[0] * 4 + [2] * 6]
    source = python_stdlib(512, separate_documents=True)
    rows = source.get(np.arange(200))
    ends = rows["tokens"][:, :-1][rows["segment_ids"][:, 1:] != rows["segment_ids"][:, :-1]]
    assert len(ends) > 2
    assert np.mean(ends == ord("\n")) > 0.9, "a file ends with its last line"


def test_token_files_without_a_separator_have_no_documents_to_keep_apart(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one two three four five six")
    tokenize([str(tmp_path / "a.txt")], tmp_path / "joined.bin")
    with pytest.raises(UserError, match=r"separate_documents: .*joined.bin has no separator"):
        tokens([str(tmp_path / "joined.bin")], 4, separate_documents=True)
    tokenize([str(tmp_path / "a.txt")] * 2, tmp_path / "apart.bin", separator=256)
    assert "segment_ids" in tokens([str(tmp_path / "apart.bin")], 4, separate_documents=True).features


def test_python_stdlib_is_whole_source_files_without_its_tests():
    content = stdlib_bytes().tobytes()
    assert 5e6 < len(content) < 40e6
    assert b"Support to pretty-print lists, tuples" in content  # pprint.py
    assert b"class TestPrettyPrint" not in content.replace(b"'", b"")
    source = python_stdlib(128)
    assert_rows_are_as_described(source)
    assert source.features["tokens"].shape == (129,)


# IDX


def write_idx(path, array, compress=False):
    codes = {"u1": 0x08, "i4": 0x0C, "f4": 0x0D}
    code = codes[array.dtype.str[1:]]
    content = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_mnist(directory, train=20, validation=5, compress=True):
    random = np.random.default_rng(0)
    suffix = ".gz" if compress else ""
    for prefix, count in (("train", train), ("t10k", validation)):
        if count:
            images = random.integers(256, size=(count, 6, 5), dtype=np.uint8)
            write_idx(directory / f"{prefix}-images-idx3-ubyte{suffix}", images, compress)
            labels = (np.arange(count) % 3).astype(np.uint8)
            write_idx(directory / f"{prefix}-labels-idx1-ubyte{suffix}", labels, compress)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_idx_reads_what_was_written(tmp_path, dtype, compress):
    array = (np.random.default_rng(0).random((3, 4, 2)) * 100).astype(dtype)
    write_idx(tmp_path / "file", array, compress)
    read = idx.read_idx(tmp_path / "file")
    np.testing.assert_array_equal(read, array)
    assert read.dtype == dtype


@pytest.mark.parametrize("compress", [False, True])
def test_idx_directory_gives_images_with_channels_and_labels(tmp_path, compress):
    write_mnist(tmp_path, compress=compress)
    train, validation = idx.idx_directory(tmp_path)
    assert (len(train), len(validation), train.classes) == (20, 5, 3)
    assert train.features["x"].shape == (6, 5, 1)
    assert train.features["x"].dtype == np.uint8
    assert everything(train)["y"].dtype == np.int32
    assert_rows_are_as_described(train)


def test_idx_directory_without_t10k_has_no_validation_set(tmp_path):
    write_mnist(tmp_path, validation=0)
    assert idx.idx_directory(tmp_path)[1] is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cut short"),
        (lambda content: content + b"x", "damaged"),
        (lambda content: content[:6], "cut short in its header"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: b"\x89PNG" + content, "not an IDX file"),
        (lambda content: gzip.compress(content)[:-9], "damaged gzip"),
        (lambda content: gzip.compress(content)[:20] + b"zzzzzzzzzzzz", "damaged gzip"),
        (lambda content: b"\0\0\x08\x03" + b"\xff" * 12, "cut short or damaged"),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.arange(200, dtype=np.uint8).reshape(4, 50))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as raised:
        idx.read_idx(path)
    assert str(path) in str(raised.value)


def test_labels_of_another_set_are_refused(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(7, np.uint8), compress=True)
    with pytest.raises(UserError, match="do not belong together"):
        idx.idx_directory(tmp_path)


def test_absent_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*data\.directory") as raised:
        idx.fashion_mnist(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.skipif(not idx.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_whole_and_balanced():
    train, validation = idx.fashion_mnist(None)
    assert (len(train), len(validation), train.classes) == (60_000, 10_000, 10)
    assert np.bincount(everything(train)["y"]).tolist() == [6000] * 10
    assert np.bincount(everything(validation)["y"]).tolist() == [1000] * 10


# Arrays


def test_npz_gives_float32_inputs_and_int32_labels_or_float_targets(tmp_path):
    x = np.random.default_rng(0).random((7, 3))
    np.savez(tmp_path / "labels.npz", x=x, y=np.arange(7), extra=np.zeros(2))
    source = npz(tmp_path / "labels.npz")
    assert source.classes == 7
    assert everything(source)["y"].dtype == np.int32
    np.testing.assert_array_equal(everything(source)["x"], x.astype(np.float32))
    np.savez(tmp_path / "targets.npz", x=x.astype(np.uint8), y=x)
    source = npz(tmp_path / "targets.npz")
    assert source.classes is None
    assert {name: f.dtype.name for name, f in source.features.items()} == {"x": "uint8", "y": "float32"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": np.zeros(3)}, "no array 'y'"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "leading dimension of equal size"),
        ({"x": np.array(["a"]), "y": np.zeros(1)}, "x has dtype"),
        ({"x": np.zeros(2), "y": np.array([-1, 0])}, "labels run from -1"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "size > 0"),
        ({"x": np.array([{}]), "y": np.zeros(1)}, "cannot read"),
    ],
)
def test_npz_that_does_not_fit_is_named(tmp_path, fields, message):
    np.savez(tmp_path / "file.npz", **fields)
    with pytest.raises(UserError, match=message) as raised:
        npz(tmp_path / "file.npz")
    assert "file.npz" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"hello", None, "cut", "npy"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    path = tmp_path / "file.npz"
    if content == "cut":
        np.savez(path, x=np.zeros((100, 9)), y=np.zeros(100))
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.npz"):
        npz(path)


@needs("sklearn", "digits")
def test_digits_are_scaled_images():
    source = digits()
    rows = everything(source)
    assert rows["x"].shape == (1797, 8, 8, 1)
    assert (rows["x"].min(), rows["x"].max(), source.classes) == (0, 1, 10)


def test_an_absent_package_names_the_extra():
    with pytest.raises(UserError, match=r"jaxdist_absent, .* pip install 'jaxdist\[digits\]'"):
        require("jaxdist_absent.part", "digits", "data.kind digits")


# Synthetic


def test_blobs_have_the_best_accuracy_that_is_said():
    rows = everything(synthetic.blobs(20_000, 6, 4, 1.5, data_seed=0))
    best = (rows["x"][:, :4].argmax(axis=1) == rows["y"]).mean()
    assert abs(best - synthetic.blobs_best_accuracy(4, 1.5)) < 4 * np.sqrt(0.25 / 20_000)


def test_regression_has_the_best_error_that_is_said():
    rows = everything(synthetic.regression(5000, 4, 2, 0.3, data_seed=0))
    fit, *_ = np.linalg.lstsq(rows["x"], rows["y"], rcond=None)
    assert abs(np.mean((rows["x"] @ fit - rows["y"]) ** 2) - 0.09) < 0.005


def test_markov_tokens_have_the_best_loss_that_is_said():
    source = synthetic.markov(2000, 50, 8, 0.3, data_seed=1)
    assert_rows_are_as_described(source)
    tokens = everything(source)["tokens"]
    loss = unigram_and_bigram([{"tokens": tokens[:1000]}], [{"tokens": tokens[1000:]}], 8)
    best = synthetic.markov_best_loss(8, 0.3, data_seed=1)
    assert abs(loss.bigram - best) < 0.02
    assert loss.unigram > loss.bigram


def test_data_seed_fixes_synthetic_data():
    one, same, other = (synthetic.markov(10, 20, 8, 0.3, seed).fields["tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


# Baselines


def test_baselines_equal_their_definition_counted_by_hand():
    random = np.random.default_rng(0)
    train, validation = random.integers(5, size=(30, 7)), random.integers(5, size=(9, 7))
    segments = np.sort(random.integers(3, size=(9, 7)), axis=1)
    pairs, singles = np.ones((5, 5)), np.ones(5)
    for row in train:
        for before, after in pairwise(row):
            pairs[before, after] += 1
            singles[after] += 1
    unigram, bigram = [], []
    for row, of in zip(validation, segments, strict=True):
        for (before, after), (one, other) in zip(pairwise(row), pairwise(of), strict=True):
            if one != other:
                continue
            unigram.append(-np.log(singles[after] / singles.sum()))
            bigram.append(-np.log(pairs[before, after] / pairs[before].sum()))
    held_out = {"tokens": validation, "segment_ids": segments}
    found = unigram_and_bigram([{"tokens": train[:11]}, {"tokens": train[11:]}], [held_out], 5)
    np.testing.assert_allclose(found, (np.mean(unigram), np.mean(bigram)), rtol=1e-12)


def test_token_windows_walks_a_stream_once():
    tokens = np.arange(101, dtype=np.uint16)
    stream = Stream.of(TokenWindows([tokens], 10, 101), np.array([1, 4, 7]), seed=0)
    chunks = [rows["tokens"] for rows in token_windows(stream, chunk=2)]
    assert [len(chunk) for chunk in chunks] == [2, 1]
    assert np.concatenate(chunks)[:, 0].tolist() == [10, 40, 70]
    assert [len(rows["tokens"]) for rows in token_windows(stream, count=2)] == [2]
