"""Below which bandwidth a run's codecs pay, for its events: what they save, and what they cost on this machine."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from jaxdist.codecs.break_even import break_even, bytes_per_step, measure_seconds
from jaxdist.sync.compressed import CompressedMean


def when_it_pays(aggregator: CompressedMean, variants: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Fields of an event `break_even` for each of these variants that compresses: bytes that a device of one replica
    sends in a step, seconds of encoding and decoding, bits per second of its link below which a step gets shorter;
    None where it never does."""
    for name in variants:
        compression = aggregator.compressions[name]
        codecs, specs, num_workers = compression.codecs, compression.specs, compression.num_workers
        if num_workers == 1 or not any(codecs):
            continue
        full = bytes_per_step([None] * len(specs), specs, num_workers)
        sent = bytes_per_step(codecs, specs, num_workers)
        seconds = measure_seconds(codecs, specs, num_workers, feedback=any(compression.remembers))
        rate = break_even(full, sent, seconds)
        yield {
            "program": name,
            "workers": num_workers,
            "full_precision_bytes": full,
            "bytes": sent,
            "seconds": seconds,
            "bits_per_second": None if rate is None or math.isinf(rate) else 8 * rate,
        }
