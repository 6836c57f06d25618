"""What a codec sends, what it costs, and on which links it pays."""

import json
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxdist.cli import main
from jaxdist.codecs import PowerSGD
from jaxdist.codecs import break_even as module
from jaxdist.codecs.blocks import buckets
from jaxdist.codecs.break_even import break_even, bytes_per_step, measure_seconds
from jaxdist.codecs.compression import Compression
from jaxdist.mesh import build_mesh
from jaxdist.telemetry.wire import collectives_of, total_bytes

DIGITS = ["data={kind: digits}", "model={kind: mlp, hidden: [64]}", "optimizer={kind: sgd}"]


def specs(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@dataclass(frozen=True)
class Bytes:
    """One byte an element, and nothing else: a codec whose payload needs no arithmetic of its own to count."""

    block: int | None = 4
    exchange: Any = "two_phase"
    unbiased: bool = False

    def contraction(self, size: int) -> float:
        return 0.5 / size

    def takes(self, spec: Any) -> bool:
        return spec.size > 0

    def init(self, spec: Any, key: Any) -> Any:
        del spec, key
        return ()

    def encode(self, x: Any, state: Any, keys: Any) -> Any:
        del keys
        return (x.astype(jnp.int8)).reshape(-1), state

    def decode(self, payload: Any, spec: Any, key_shared: Any) -> Any:
        del key_shared
        return payload.astype(spec.dtype).reshape(spec.shape)


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_bytes_of_each_exchange_are_those_of_the_textbook(num_workers):
    n, ring = 64, 2 * (num_workers - 1) / num_workers
    of = specs((n,))
    assert bytes_per_step([None], of, num_workers) == pytest.approx(ring * 4 * n)
    assert bytes_per_step([Bytes()], of, num_workers) == pytest.approx(ring * n)
    assert bytes_per_step([Bytes(None, "sum")], of, num_workers) == pytest.approx(ring * n)
    assert bytes_per_step([Bytes(None, "gather")], of, num_workers) == pytest.approx((num_workers - 1) * n)
    rank, (rows, columns) = 2, (40, 30)
    thin = 4 * rank * (rows + columns)
    assert bytes_per_step([PowerSGD(rank)], specs((rows, columns)), num_workers) == pytest.approx(ring * thin)


def test_arrays_that_share_a_vector_are_filled_up_to_blocks_and_the_vector_to_workers():
    # 5 and 3 elements are 2 + 1 blocks of 4; 3 blocks are one block for each of 4 workers
    assert bytes_per_step([Bytes(), Bytes()], specs((5,), (3,)), 4) == 2 * 3 * 4


def test_bytes_are_those_of_the_compiled_collectives():
    of, num_workers = specs((100,), (30, 20), (7,)), 8
    codecs = (Bytes(), PowerSGD(2), None)
    compression = Compression(codecs, tuple(of), num_workers)
    mesh = build_mesh({"data": num_workers}, jax.devices())

    def mean(arrays):
        memory, states = compression.init_memory(), compression.init(jax.random.key(0))
        norm = lambda xs: sum(jnp.sum(x * x) for x in xs)  # noqa: E731
        return compression.mean(arrays, memory, states, jax.random.key(1), "data", norm)[0]

    everywhere = PartitionSpec()
    step = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False))
    compiled = step.lower([jnp.zeros(x.shape) for x in of]).compile()
    sent = sum(total_bytes(c) for c in collectives_of(compiled.as_text(), mesh)) / num_workers
    assert bytes_per_step(codecs, of, num_workers) == pytest.approx(sent)


def test_below_the_break_even_bandwidth_a_compressed_step_is_shorter_and_above_it_longer():
    dense, compressed, seconds = 4e6, 1e6, 0.003
    bandwidth = break_even(dense, compressed, seconds)
    for factor in (0.5, 0.99, 1.01, 2.0):
        saved = (dense - compressed) / (factor * bandwidth)
        assert (saved > seconds) == (factor < 1)


def test_what_costs_nothing_always_pays_and_what_sends_no_less_never_does():
    assert break_even(4.0, 1.0, 0.0) == math.inf
    assert break_even(4.0, 4.0, 0.1) is None
    assert break_even(4.0, 5.0, 0.0) is None


def test_only_what_is_compressed_takes_time():
    of = specs((1000,), (50, 40))
    assert measure_seconds([None, None], of, 4) == 0
    assert measure_seconds([Bytes(), PowerSGD(2)], of, 4, feedback=True, repeats=1) > 0


def test_an_array_too_large_to_time_whole_loses_layers_or_rows_and_keeps_its_other_dimensions(monkeypatch):
    monkeypatch.setattr(module, "MOST_ELEMENTS", 1000)
    codecs = [Bytes(), PowerSGD(2, stacked=1), PowerSGD(2)]
    found = buckets(codecs, specs((4000,), (6, 20, 10), (20, 10)), 4)
    assert [module._timed(bucket).spec.shape for bucket in found] == [(1000,), (5, 20, 10), (20, 10)]


def test_the_command_prints_a_line_a_codec_the_least_sent_first(capsys):
    arguments = ["codecs", "quickstart", *DIGITS, "gradient_compression.up.kind=int4", "--only", "qsgd,int8"]
    assert main([*arguments, "--workers", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["codec"]: row for row in found["codecs"]}
    assert found["workers"] == 8
    sent = [row["bytes"] for row in found["codecs"]]
    assert sent == sorted(sent)
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    assert rows["none"]["bytes"] == pytest.approx(2 * 7 / 8 * 4 * parameters)
    assert set(rows) == {"none", "int8", "qsgd", "this config: int4"}
    assert rows["int8"]["error_feedback"]
    assert not rows["qsgd"]["error_feedback"]
    int8 = rows["int8"]
    saved = 8 * (rows["none"]["bytes"] - int8["bytes"])
    assert int8["bits_per_second"] == pytest.approx(saved / int8["seconds"])


def test_sizes_are_in_the_unit_that_suits_them_and_none_may_be_named(capsys):
    arguments = ["codecs", "quickstart", *DIGITS, "model.hidden=[8192]", "gradient_compression.up.kind=sign"]
    assert main([*arguments, "--only", "none"]) == 0
    sign, none = capsys.readouterr().out.splitlines()[-2:]
    weights, biases, ring = 64 * 8192 + 8192 * 10, 8192 + 10, 2 * 3 / 4
    of_sign = ring * (weights / 256 * (256 / 8 + 2) + 4 * biases)
    assert sign.startswith(f"this config: sign  {of_sign / 1e3:.2f} kB  ")
    assert none.startswith(f"none                 {ring * 4 * (weights + biases) / 1e6:.2f} MB  ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "1"], "1 exchange nothing"),
        (["--only", "powersgd", "model.hidden=[4]"], "none of them makes this model's parameters smaller"),
        (["--only", "int8,topkk"], "--only: no codec topkk; there are bf16"),
        (["--only", "none"], "--only: none is what codecs are compared with; name one beside it: bf16"),
        (["strategy.mesh={data: 2, fsdp: -1}"], "strategy.mesh.fsdp: -1 leaves open"),
        (["strategy={target: 'a:b'}"], "a strategy of your own"),
    ],
)
def test_a_model_or_mesh_of_which_nothing_can_be_said_is_refused(arguments, expected, capsys):
    assert main(["codecs", "quickstart", *DIGITS, *arguments]) == 2
    assert expected in capsys.readouterr().err
