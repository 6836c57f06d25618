"""What a round computes, step by step: NumPy, a pure function of seed and round, the same on every host.

The clients of a cohort stand in the order of their slots, lane by lane; behind one another their local steps are one
long sequence, of which a device takes a part without gaps. B samples of a step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxdist.data.order import derive_key
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.draws import mix
from jaxdist.federated.lanes import assign, slots_per_lane


class Segment(NamedTuple):
    """A client's steps in one dispatch, or those of them that fit into it; int32 scalars, or arrays of many."""

    slot: Any  # counted from the device's first
    client: Any
    start: Any  # first step, counted from the dispatch's first on this device
    train: Any  # before this step, the loss of the global model is measured; from it on, steps train
    stop: Any  # behind the last
    step: Any  # number of the client's training step at `train`
    first: Any  # whether the client begins here
    last: Any  # whether it ends here
    num_samples: Any  # of the client
    num_steps: Any  # it trains, in all
    draws: Any  # how often the client was drawn: so often its message counts


class Chunk(NamedTuple):
    """One dispatch, as NumPy or jax arrays: D devices, T steps, S segments."""

    positions_DxTxB: Any  # int32: rows of the partition's samples
    counts_DxT: Any  # int32: rows of a step that count; those behind repeat the client's own
    segments_DxSxF: Any  # int32: fields of Segment
    num_segments_D: Any  # int32


@dataclass(frozen=True)
class Work:
    """A round's, for any number of devices."""

    clients: np.ndarray  # int32 [slots]: whose slot it is; the number of clients where it is nobody's
    positions: np.ndarray  # int32 [steps, B]
    counts: np.ndarray  # int32 [steps]
    slots: np.ndarray  # int64 [n]: slot of each client of the cohort, ascending
    num_samples: np.ndarray  # int64 [n]
    starts: np.ndarray  # int64 [n + 1]: where each begins in the sequence
    measured: np.ndarray  # int64 [n]: steps that only measure
    draws: np.ndarray  # int64 [n]: how often each counts
    first_steps: np.ndarray  # int64 [n]: number of the first step that trains
    num_lanes: int

    @property
    def cohort_size(self) -> int:
        return len(self.slots)

    @property
    def num_steps(self) -> np.ndarray:
        """That train, int64 [n]."""
        return np.diff(self.starts) - self.measured

    @property
    def samples(self) -> int:
        """Trained on, counted as often as they are."""
        steps = np.arange(len(self.counts)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return int(self.counts[steps >= np.repeat(self.measured, np.diff(self.starts))].sum())

    def loads(self, num_devices: int) -> np.ndarray:
        """Steps of each device, int64 [devices]."""
        return np.diff(self.starts[self._bounds(num_devices)])

    def makespan(self, num_devices: int) -> float:
        """The longest device's steps over the mean of all; NaN where there are none."""
        loads = self.loads(num_devices)
        return float(loads.max() / loads.mean()) if loads.any() else math.nan

    def _bounds(self, num_devices: int) -> np.ndarray:
        """Where in the cohort each device begins, and the last ends: int64 [devices + 1]."""
        here = len(self.clients) // num_devices
        return np.searchsorted(self.slots, np.arange(num_devices + 1) * here)

    def num_chunks(self, num_devices: int, capacity: int) -> int:
        return max(1, -(-int(self.loads(num_devices).max()) // capacity))

    def chunks(self, num_devices: int, capacity: int) -> Iterator[Chunk]:
        """Dispatches of at most `capacity` steps of each device."""
        bounds, here = self._bounds(num_devices), len(self.clients) // num_devices
        B = self.positions.shape[1]
        for chunk in range(self.num_chunks(num_devices, capacity)):
            positions = np.zeros((num_devices, capacity, B), np.int32)
            counts = np.zeros((num_devices, capacity), np.int32)
            segments = np.zeros((num_devices, here, len(Segment._fields)), np.int32)
            num_segments = np.zeros(num_devices, np.int32)
            for device, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
                low = self.starts[a] + chunk * capacity
                high = min(low + capacity, self.starts[b])
                if low >= high:
                    continue
                positions[device, : high - low] = self.positions[low:high]
                counts[device, : high - low] = self.counts[low:high]
                own = self._segments(a, b, int(low), int(high), here * device)
                segments[device, : len(own)] = own
                num_segments[device] = len(own)
            yield Chunk(positions, counts, segments, num_segments)

    def _segments(self, a: int, b: int, low: int, high: int, first_slot: int) -> np.ndarray:
        """Of clients a to b, those parts that lie in steps low to high: int32 [segments, fields]."""
        begin, end = self.starts[a:b], self.starts[a + 1 : b + 1]
        train = begin + self.measured[a:b]
        rows = Segment(
            slot=self.slots[a:b] - first_slot,
            client=self.clients[self.slots[a:b]],
            start=np.maximum(begin, low) - low,
            train=np.clip(train, low, high) - low,
            stop=np.minimum(end, high) - low,
            step=np.maximum(low - train, 0) + self.first_steps[a:b],
            first=begin >= low,
            last=end <= high,
            num_samples=self.num_samples[a:b],
            num_steps=end - train,
            draws=self.draws[a:b],
        )
        return np.stack(rows, axis=1)[(begin < high) & (end > low)]


@dataclass(frozen=True)
class Plan:
    """What of the schedule is the same in every round. Exactly one of local_epochs, local_steps."""

    seed: int
    offsets: np.ndarray  # int64 [clients + 1]: where each client's rows begin
    batch_size: int
    local_epochs: int | None
    local_steps: int | None
    num_lanes: int
    max_cohort: int
    measures: bool = False  # the loss of the global model on each client's data, before it trains

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def slots_per_lane(self) -> int:
        return slots_per_lane(self.max_cohort, self.num_lanes)

    def steps_of(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(steps that only measure, steps that train) of clients with so many samples."""
        in_epoch = -(-sizes // self.batch_size)
        train = in_epoch * self.local_epochs if self.local_epochs else np.full(len(sizes), self.local_steps)
        return in_epoch * self.measures, train

    def samples_of(self, sizes: np.ndarray) -> np.ndarray:
        """That clients with so many samples train on, counted as often as they are."""
        if self.local_epochs:
            return sizes * self.local_epochs
        assert self.local_steps is not None
        return np.full(len(sizes), self.local_steps * self.batch_size)

    def work(self, round_: int, cohort: Cohort, turn: int = 0) -> Work:
        """Each client has at least one sample.

        `turn`: how often these clients have trained in this round before; they go on to other epochs.
        """
        clients, draws = cohort.clients, cohort.draws
        measured, whole = self.steps_of(self.sizes[clients])
        train = whole if cohort.most_steps is None else np.minimum(whole, cohort.most_steps)
        draws = np.ones(len(clients), np.int64) if draws is None else draws
        slots = assign(measured + train, self.num_lanes, self.slots_per_lane)
        order = np.argsort(slots)
        clients, slots, measured, train = clients[order], slots[order], measured[order], train[order]
        places = np.full(self.num_lanes * self.slots_per_lane, self.num_clients, np.int32)
        places[slots] = clients
        starts = np.concatenate([[0], np.cumsum(measured + train)])
        positions, counts = self._rows(round_, clients, measured, train, turn)
        sizes, first_steps = self.sizes[clients], turn * whole[order]
        return Work(
            places, positions, counts, slots, sizes, starts, measured, draws[order], first_steps, self.num_lanes
        )

    def _rows(
        self, round_: int, cohort: np.ndarray, measured: np.ndarray, train: np.ndarray, turn: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(positions int32 [steps, B], counts int32 [steps]), all clients behind one another.

        With epochs, the last step of one fills up with the client's own rows, which do not count; with a number of
        steps, they run on into the next epoch.
        """
        B, sizes = self.batch_size, self.sizes[cohort]
        if len(cohort) == 0:
            return np.zeros((0, B), np.int32), np.zeros(0, np.int32)
        steps = measured + train
        owner = np.repeat(np.arange(len(cohort)), steps)
        step = np.arange(len(owner)) - np.repeat(np.cumsum(steps) - steps, steps) - measured[owner]
        n, per_epoch = sizes[owner], -(-sizes[owner] // B)
        measures = step < 0
        step = np.where(measures, step + measured[owner], step)  # within its own sort
        cells = np.arange(B)
        if self.local_epochs:
            epochs = np.full(len(cohort), self.local_epochs)
            epoch, within = np.divmod(step, per_epoch)
            row = (within[:, None] * B + cells) % n[:, None]
            place = epoch[:, None] * n[:, None] + row
            counts = np.minimum(B, n - within * B)
        else:
            epochs = -(-train * B // sizes)
            place = step[:, None] * B + cells
            row = place % n[:, None]
            counts = np.where(measures, np.minimum(B, n - step * B), B)
        order, base = shuffled(self.seed, round_, cohort, sizes, epochs, turn)
        if self.measures:
            place = np.where(measures[:, None], 0, place)
        local = order[base[owner][:, None] + place]
        if self.measures:
            local = np.where(measures[:, None], row, local)
        return (self.offsets[cohort][owner][:, None] + local).astype(np.int32), counts.astype(np.int32)


def shuffled(
    seed: int, round_: int, clients: np.ndarray, sizes: np.ndarray, epochs: np.ndarray, turn: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """For each client, for each of its epochs, a permutation of its samples: (all of them behind one another, where
    each client's begin). One sort of hashes of (seed, round, client, epoch, sample) for the whole cohort; epochs are
    counted on over a client's turns."""
    key = derive_key(seed, "client order", round_)
    lengths = np.repeat(sizes, epochs)
    ends = np.cumsum(lengths)
    part = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    epoch = np.arange(len(lengths)) - np.repeat(np.cumsum(epochs) - (turn + 1) * epochs, epochs)
    of_part = mix(mix(np.repeat(clients, epochs).astype(np.uint64), key[0]) + epoch.astype(np.uint64), key[1])
    hashed = mix(of_part[part] + within.astype(np.uint64), key[2])
    bits = len(lengths).bit_length()
    hashed = (hashed >> np.uint64(bits)) | (part.astype(np.uint64) << np.uint64(64 - bits))
    order = np.argsort(hashed, kind="stable") - (ends - lengths)[part]
    of_client = sizes * epochs
    return order, np.cumsum(of_client) - of_client
