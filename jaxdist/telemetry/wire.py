"""What a compiled program sends between devices, read from the program itself.

    devices in a group N, bytes of one device's operand B     sent by each device of the group
    all-gather                                                (N-1) x B
    reduce-scatter, all-to-all                                (N-1)/N x B
    all-reduce (a reduce-scatter, then an all-gather)         2(N-1)/N x B
    collective-permute                                        B, by the devices that have a target

These are the least that any algorithm moves, and what ring algorithms do move. As many bytes are received.
Only the compiled program tells: XLA merges, moves and widens collectives (bf16 to fp32 on CPU, for example).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxdist.telemetry.hlo import (
    Groups,
    Instruction,
    Module,
    parse_hlo,
    replica_groups,
    size_of,
    source_target_pairs,
)

# Bytes sent by one device over the bytes of its operand, by the size N of its group, times N to stay whole.
_FACTOR_TIMES_N = {
    "all-gather": lambda n: n * (n - 1),
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: n - 1,
    "ragged-all-to-all": lambda n: n - 1,  # at most: how much of the operand is sent is known only at run time
    "collective-broadcast": lambda n: n - 1,  # on average: one device of the group sends N-1 copies
    "all-reduce": lambda n: 2 * (n - 1),
    "collective-permute": lambda n: n,
}


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as often as one run of the program does it."""

    name: str  # of the instruction
    op: str  # "all-reduce", ...; the asynchronous forms go by the same names
    dtype: str  # HLO's: "f32", "bf16", "u8"; several as "bf16+f32"
    operand_bytes: int  # of one device, all operands together
    groups: Groups  # partition ids that exchange; for a permutation its (source, target) pairs
    axis: str  # mesh axis, several as "data+fsdp"
    trip_count: int  # runs of it in one run of the program
    in_loop: bool
    exact: bool  # False where a loop of unknown length (counted once) or a branch (counted as taken) holds it

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)


def collectives_of(
    hlo: str, mesh: jax.sharding.Mesh, device_order: Sequence[jax.Device] | None = None
) -> list[Collective]:
    """The collectives of a compiled program, from `compiled.as_text()`.

    `device_order` gives the device of each partition; it is the mesh's order unless the program was compiled
    for another. Collectives within groups of one device move nothing and are left out.
    Raises ValueError where the text cannot be read.
    """
    module = parse_hlo(hlo)
    found = []
    for instruction, operands, trips, in_loop, exact in _runs(module, module.entry, 1, False, True):
        op = _collective_op(instruction)
        if op is None:
            continue
        if op == "collective-permute":
            groups = source_target_pairs(instruction.attributes)
        else:
            groups = replica_groups(instruction.attributes, mesh.size)
        if not (axis := axes_of(groups, mesh, device_order)):
            continue
        dtypes, operand_bytes = size_of(operands)
        found.append(
            Collective(
                name=instruction.name,
                op=op,
                dtype="+".join(sorted(dtypes)),
                operand_bytes=operand_bytes,
                groups=groups,
                axis=axis,
                trip_count=trips,
                in_loop=in_loop,
                exact=exact,
            )
        )
    return found


def _collective_op(instruction: Instruction) -> str | None:
    op = instruction.op.removesuffix("-start")
    return op if op in _FACTOR_TIMES_N else None


def _runs(
    module: Module, computation: str, trips: int, in_loop: bool, exact: bool
) -> Iterator[tuple[Instruction, str, int, bool, bool]]:
    """Every instruction that a computation runs, itself or by a call, with its operands' types.

    One that is called from two places comes twice.
    """
    instructions = module.computations[computation]
    for instruction in instructions.values():
        operands = " ".join(instructions[name].type for name in instruction.operands if name in instructions)
        yield instruction, operands, trips, in_loop, exact
        if _collective_op(instruction):
            continue  # what it calls adds two numbers
        for role, called in instruction.called:
            if called not in module.computations:
                continue
            if role in ("body", "condition"):
                count = instruction.trip_count
                runs = (1 if count is None else count) + (role == "condition" and count is not None)
                yield from _runs(module, called, trips * runs, True, exact and count is not None)
            else:
                always = role in ("to_apply", "calls")
                yield from _runs(module, called, trips, in_loop, exact and always)


def axes_of(groups: Groups, mesh: jax.sharding.Mesh, device_order: Sequence[jax.Device] | None = None) -> str:
    """The mesh axes along which the devices of a group differ: "data", "data+fsdp"; "" if they never do.

    `groups` hold partition ids, positions in `device_order` (by default the order of `mesh.devices`).
    """
    if device_order is None:
        place = np.arange(mesh.size)
    else:
        position = {device: index for index, device in enumerate(mesh.devices.flat)}
        place = np.array([position[device] for device in device_order])
    differ = np.zeros(mesh.devices.ndim, dtype=bool)
    for group in groups:
        coordinates = np.array(np.unravel_index(place[list(group)], mesh.devices.shape))
        differ |= (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(name for name, differs in zip(mesh.axis_names, differ, strict=True) if differs)


def wire_bytes(collective: Collective) -> float:
    """Bytes that one device of a group sends each time the collective runs."""
    n = collective.group_size
    return _FACTOR_TIMES_N[collective.op](n) * collective.operand_bytes / n


def total_bytes(collective: Collective) -> int:
    """Bytes that all devices together send by a collective in one run of the program."""
    if collective.op == "collective-permute":
        each_time = len(collective.groups) * collective.operand_bytes
    else:
        factor = _FACTOR_TIMES_N[collective.op]
        each_time = sum(factor(len(group)) for group in collective.groups) * collective.operand_bytes
    return each_time * collective.trip_count


def bytes_by_axis(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes that all devices together send in one run of the program, by mesh axis; as many are received."""
    totals: dict[str, int] = {}
    for collective in collectives:
        totals[collective.axis] = totals.get(collective.axis, 0) + total_bytes(collective)
    return totals


class CountedProgram:
    """A jitted function that is compiled once, for the shapes of its first call, and counts what its calls send."""

    def __init__(self, function: Callable[..., Any], mesh: jax.sharding.Mesh):
        self._function, self._mesh = jax.jit(function), mesh
        self._compiled: jax.stages.Compiled | None = None
        self._each: dict[str, int] = {}
        self._calls = 0

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """For arguments like these (ShapeDtypeStructs with shardings will do), if it was not yet."""
        if self._compiled is None:
            self._compiled = self._function.lower(*arguments).compile()
            self._each = bytes_by_axis(collectives_of(self._compiled.as_text() or "", self._mesh))
        return self._compiled

    def __call__(self, *arguments: Any) -> Any:
        compiled = self.compile(*arguments)
        self._calls += 1
        return compiled(*arguments)

    @property
    def bytes_by_axis(self) -> dict[str, int]:
        """Bytes sent by all calls so far, over all devices."""
        return {axis: self._calls * count for axis, count in self._each.items()}
