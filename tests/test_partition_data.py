"""Clients in a run's data: natural ones, what they keep for validation, their features, manifests, the command."""

import argparse
import json
import re
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from jaxdist.cli import data as command
from jaxdist.config.data import DataConfig, PythonStdlib, SyntheticBlobs, SyntheticRatings, Text
from jaxdist.config.errors import UserError
from jaxdist.config.partition import Partition as Block
from jaxdist.data.arrays import Arrays
from jaxdist.data.build import build_data
from jaxdist.data.partition.attach import attach
from jaxdist.data.partition.manifest import load
from jaxdist.data.partition.picture import picture
from jaxdist.data.partition.workers import ids_by_worker
from jaxdist.data.stream import Stream

BLOBS = {"kind": "synthetic_blobs", "samples": 600, "classes": 4, "features": 6}


def block(**fields):
    return TypeAdapter(DataConfig).validate_python(fields)


def images(num_samples=60, dtype=np.float32):
    x = np.random.default_rng(0).integers(0, 256, (num_samples, 6, 6, 1)).astype(dtype)
    return Arrays({"x": x, "y": np.arange(num_samples, dtype=np.int32) % 3}, classes=3)


def of_clients(source, seed=0, ids=None, **fields):
    return attach(Stream.of(source, ids, seed), Block(**fields), seed)


def test_data_without_a_partition_have_none_and_with_one_the_same_order():
    plain = build_data(block(**BLOBS), seed=3)
    divided = build_data(block(**BLOBS, partition={"clients": 7}), seed=3)
    assert plain.partition is None
    assert divided.partition.num_clients == 7
    positions = np.arange(1500)
    np.testing.assert_array_equal(divided.train.ids(positions), plain.train.ids(positions))
    np.testing.assert_array_equal(
        np.sort(divided.partition.ids), np.sort(plain.train.ids(np.arange(len(plain.train))))
    )


@pytest.mark.parametrize("fraction", [0.2, 0.99, 0.001])
def test_clients_keep_a_part_of_their_own_samples_that_nobody_trains_on(fraction):
    fields = {"clients": 9, "sizes": {"kind": "power_law", "exponent": 1.5}}
    whole = build_data(block(**BLOBS, partition=fields), seed=0).partition
    data = build_data(block(**BLOBS, partition={**fields, "validation_fraction": fraction}), seed=0)
    train, validation = data.partition, data.partition.validation
    for c in range(9):
        both = np.concatenate([train.of(c), validation.of(c)])
        np.testing.assert_array_equal(np.sort(both), whole.of(c))
        expected = min(max(round(len(both) * fraction), 1), len(both) - 1)
        assert len(validation.of(c)) == expected
    assert set(data.train.ids(np.arange(len(data.train))).tolist()) == set(train.ids.tolist())


def test_a_client_of_one_sample_trains_on_it():
    _, partition = of_clients(images(4), clients=4, validation_fraction=0.9)
    assert partition.sizes.tolist() == [1, 1, 1, 1]
    assert len(partition.validation.ids) == 0


def test_natural_clients_are_the_values_of_a_field():
    ratings = SyntheticRatings(samples=3000, users=20, items=30, partition={"natural": "user", "min_samples": 100})
    data = build_data(ratings, seed=0)
    users = data.train.source.fields["user"]
    for c, name in enumerate(data.partition.names):
        assert (users[data.partition.of(c)] == int(name)).all()
    held = data.train.source
    kept = build_data(ratings.model_copy(update={"partition": None}), seed=0).train
    counts = np.bincount(held.fields["user"][kept.ids(np.arange(len(kept)))], minlength=20)
    assert data.partition.names == tuple(str(u) for u in np.flatnonzero(counts >= 100))
    assert len(data.partition.ids) == counts[counts >= 100].sum() == len(data.train)


def test_a_users_own_data_say_whose_a_sample_is(tmp_path, monkeypatch):
    (tmp_path / "owned.py").write_text(
        "import numpy as np\n"
        "def schools(wrong=False):\n"
        "    names = np.array(['north', 'south', 'east'])[np.arange(90) % 3]\n"
        "    return {'x': np.zeros((90, 2)), 'y': np.arange(90) % 2, 'client': names[:5] if wrong else names}\n"
    )
    monkeypatch.chdir(tmp_path)
    partition = {"natural": "client"}
    data = build_data(block(target="owned:schools", partition=partition), seed=0)
    assert data.partition.names == ("east", "north", "south")
    assert (data.partition.of(1) % 3 == 0).all()
    assert set(data.train.features) == {"x", "y", "sample_id", "weight"}
    with pytest.raises(UserError, match=r"client is <U5\[5\]; one integer or string for each of the 90"):
        build_data(block(target="owned:schools", wrong=True, partition=partition), seed=0)


def test_the_clients_of_text_are_its_files_and_of_the_standard_library_its_modules(tmp_path):
    for name, letter, length in (("one", "a", 50), ("two", "b", 7), ("three", "c", 40)):
        (tmp_path / f"{name}.txt").write_text(letter * length)
    files = Text(files=[str(tmp_path / "*.txt")], partition={"natural": "client"}, validation_fraction=None)
    data = build_data(files, seed=0, context=5)
    of_letter = {ord("a"): "one", ord("b"): "two", ord("c"): "three"}
    owned = [(data.partition.names[c], data.partition.of(c)) for c in range(len(data.partition.names))]
    for name, ids in owned:
        firsts = data.train.source.get(ids)["tokens"][:, 0]
        assert {of_letter[int(first)] for first in firsts} == {Path(name).stem}
    library = build_data(PythonStdlib(partition={"natural": "client", "min_samples": 20}), seed=0, context=256)
    assert {"asyncio", "argparse", "json"} <= set(library.partition.names)
    windows = np.sort(library.partition.of(library.partition.names.index("argparse")))
    content = [row.tobytes() for row in library.train.source.get(windows)["tokens"]]
    whole = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()
    assert len(content) > 20
    assert all(text in whole for text in content[:-1]), "the last one may reach into the next module"


def test_rotation_turns_the_images_of_a_client_by_quarters():
    source = images()
    stream, partition = of_clients(source, clients=6, features={"kind": "rotation"}, ids=np.arange(50))
    for c in range(6):
        turned = stream.source.get(partition.of(c))["x"]
        by_hand = np.stack([np.rot90(x, c % 4) for x in source.fields["x"][partition.of(c)]])
        np.testing.assert_array_equal(turned, by_hand)
    others = np.arange(50, 60)  # of nobody
    np.testing.assert_array_equal(stream.source.get(others)["x"], source.fields["x"][others])
    two, partition = of_clients(source, clients=6, features={"kind": "rotation", "groups": 2})
    half = two.source.get(partition.of(3))["x"]
    np.testing.assert_array_equal(half, source.fields["x"][partition.of(3)][:, ::-1, ::-1])


def test_noise_grows_with_the_client_and_is_the_same_whenever_a_sample_is_read():
    source = Arrays({"x": np.zeros((400, 30), np.float32), "y": np.zeros(400, np.int32)}, classes=1)
    stream, partition = of_clients(source, clients=4, features={"kind": "noise", "strength": 0.8})
    for c in range(4):
        noise = stream.source.get(partition.of(c))["x"] / (0.8 * (c + 1) / 4)
        degrees = noise.size
        assert stats.chi2.ppf(1e-4, degrees) < (noise**2).sum() < stats.chi2.ppf(1 - 1e-4, degrees)
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    ids = np.array([7, 300, 7, 12])
    again = stream.source.get(ids)["x"]
    np.testing.assert_array_equal(again[0], again[2])
    np.testing.assert_array_equal(again[1], stream.source.get(np.arange(400))["x"][300])
    assert source.fields["x"].any() == 0
    other, _ = of_clients(source, 1, clients=4, features={"kind": "noise", "strength": 0.8})
    assert (other.source.get(ids)["x"] != again).any()


def test_noise_on_bytes_stays_in_their_range_and_scale():
    source = images(200, np.uint8)
    stream, partition = of_clients(source, clients=1, features={"kind": "noise", "strength": 0.1})
    before, after = source.fields["x"][partition.of(0)].astype(float), stream.source.get(partition.of(0))["x"]
    assert after.dtype == np.uint8
    inside = (before > 100) & (before < 155)  # four deviations from the ends
    assert np.std((after - before)[inside]) == pytest.approx(25.5, rel=0.1)


def test_gain_is_one_factor_for_each_client():
    source = images()
    stream, partition = of_clients(source, clients=10, features={"kind": "gain", "strength": 0.5})
    factors = []
    for c in range(10):
        before, after = source.fields["x"][partition.of(c)], stream.source.get(partition.of(c))["x"]
        ratio = (after[before > 0] / before[before > 0]).astype(float)
        assert np.ptp(ratio) < 1e-5
        factors.append(ratio[0])
    assert 0.5 <= min(factors) < 0.9
    assert 1.1 < max(factors) <= 1.5


@pytest.mark.parametrize(
    ("source", "features", "message"),
    [
        (Arrays({"tokens": np.zeros((9, 4), np.uint8)}), {"kind": "gain", "strength": 0.5}, "the data have tokens"),
        (Arrays({"x": np.zeros((9, 4, 5))}), {"kind": "rotation"}, "square ones"),
        (Arrays({"x": np.zeros((9, 4))}), {"kind": "rotation", "groups": 2}, r"x is \[4\]"),
    ],
)
def test_features_that_cannot_be_shifted_so_are_refused(source, features, message):
    with pytest.raises(UserError, match=message):
        of_clients(source, clients=2, features=features)


def parsed(arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["data", "partition", *arguments])


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    partition = (
        "{clients: 5, labels: {kind: shards}, features: {kind: gain, strength: 0.2}, validation_fraction: 0.1}"
    )
    for name, asked in (("blobs", partition), ("again", "{manifest: kept.json}"), ("plain", "null")):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nmodel: {{kind: mlp}}\noptimizer: {{kind: sgd, learning_rate: 0.1}}\n"
            f"data: {{kind: synthetic_blobs, samples: 600, features: 4, partition: {asked}}}\n"
        )
    return "blobs.yaml"


def test_the_command_shows_keeps_and_draws_and_the_manifest_gives_the_same_clients(config, capsys, tmp_path):
    assert command.run(parsed([config, "-o", "kept.json", "--picture", "kept.svg"])) == 0
    shown = capsys.readouterr().out
    assert "clients     5\nsamples     485 for training, 55 for the clients' validation, 0 of nobody\n" in shown
    kept = json.loads((tmp_path / "kept.json").read_text())
    blobs = SyntheticBlobs(samples=600, features=4)
    made = build_data(blobs.model_copy(update={"partition": Block(**kept["config"])}), seed=0)
    loaded = build_data(blobs.model_copy(update={"partition": Block(manifest=tmp_path / "kept.json")}), seed=0)
    np.testing.assert_array_equal(loaded.partition.ids, made.partition.ids)
    np.testing.assert_array_equal(loaded.partition.validation.ids, made.partition.validation.ids)
    for field, array in loaded.train.at(0, 100).items():
        np.testing.assert_array_equal(array, made.train.at(0, 100)[field])
    labels = made.train.source.get(made.partition.of(2))["y"]
    counts = {str(label): int((labels == label).sum()) for label in np.unique(labels)}
    assert kept["clients"][2] == {"name": "2", "samples": 97, "validation": 11, "labels": counts}


def test_a_manifest_of_other_data_or_a_damaged_one_is_refused(config, tmp_path):
    command.run(parsed([config, "-o", "kept.json"]))
    with pytest.raises(UserError, match="made from other data: 540 samples"):
        command.run(parsed(["again.yaml", "data.data_seed=1"]))
    with pytest.raises(UserError, match="with its seed 0"):
        command.run(parsed(["again.yaml", "seed=1"]))
    source = build_data(SyntheticBlobs(samples=600, features=4), 0).train.source
    text = json.loads((tmp_path / "kept.json").read_text())
    text["clients"][0]["samples"] += 1
    text["clients"][1]["samples"] -= 1
    changed = tmp_path / "changed.json"
    for content, message in [
        (json.dumps(text), "do not have the SHA-256"),
        (json.dumps({**text, "ids": "x"}), "is damaged"),
        (json.dumps({"ids": []}), "is no partition"),
        ("[", "is not JSON"),
    ]:
        changed.write_text(content)
        with pytest.raises(UserError, match=message):
            load(changed, source, np.arange(600))
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "absent.json", source, np.arange(600))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain.yaml"], "has no data.partition"),
        (["blobs.yaml", "--picture", "a.png"], "end in .svg"),
        (["blobs.yaml", "--picture", "absent/a.svg"], "cannot write absent/a.svg"),
        (["blobs.yaml", "-o", "absent/a.json"], "cannot write absent/a.json"),
        (["again.yaml", "-o", "b.json"], "has no effect with data.partition.manifest"),
    ],
)
@pytest.mark.usefixtures("config")
def test_a_command_that_cannot_be_done_says_what_would_work(arguments, message):
    with pytest.raises(UserError, match=message):
        command.run(parsed(arguments))


@pytest.mark.parametrize(("num_clients", "num_labels"), [(1, 1), (10, 10), (500, 30)])
def test_bars_of_the_picture_are_as_high_as_the_clients_are_large(num_clients, num_labels):
    counts = np.random.default_rng(0).integers(0, 90, (num_clients, num_labels))
    drawing = ElementTree.fromstring(picture(counts, tuple(f"<{c}>" for c in range(num_clients)), "a & b"))
    heights = {}
    for path in drawing.iter("{http://www.w3.org/2000/svg}path"):
        for x, height in re.findall(r"M([\d.]+) [\d.]+h[\d.]+v-([\d.]+)", path.get("d")):
            heights[float(x)] = heights.get(float(x), 0) + float(height)
    sizes = counts.sum(axis=1)
    if num_clients > 200:
        sizes = np.sort(sizes)[::-1][np.linspace(0, num_clients - 1, 200).astype(int)]
    found = np.array([heights[x] for x in sorted(heights)])
    np.testing.assert_allclose(found / found.max(), sizes / sizes.max(), atol=0.005)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**20))
def test_each_worker_reads_its_own_client_alone_and_every_sample_of_it_in_every_epoch(workers, rows, batches, start):
    _, partition = of_clients(images(), clients=workers, sizes={"kind": "power_law", "exponent": 0.5})
    streams = [Stream.of(images(), partition.of(w), 0, f"client {w}") for w in range(workers)]
    size = workers * rows
    ids = ids_by_worker(np.arange(start * size, (start + batches) * size), streams, size).reshape(
        batches, workers, rows
    )
    for w, stream in enumerate(streams):
        own = stream.ids(np.arange(start * rows, (start + batches) * rows))
        np.testing.assert_array_equal(ids[:, w].ravel(), own)
        assert np.isin(ids[:, w], partition.of(w)).all()
