"""Reads compiled HLO text (`compiled.as_text()`), as far as counting what its instructions move needs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Grammar: https://openxla.org/xla/operation_semantics and the printer, xla/hlo/ir/hlo_instruction.cc.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_ELEMENT_BITS = re.compile(r"E\((\d+)\)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}')
_CALLED = re.compile(
    r"\b(to_apply|calls|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_EXPLICIT = re.compile(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_AXIS_SIZE = re.compile(r"'([^']*)'=(\d+)")
_AXIS_USED = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}")

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Instruction:
    """A line of a computation. `type` is the text of its result's type; `operands` are instruction names."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> Iterator[tuple[str, str]]:
        """(role, name) of each computation that it runs."""
        for role, names in _CALLED.findall(self.attributes):
            for name in names.strip("{}").split(","):
                yield role, name.strip().lstrip("%")

    @property
    def trip_count(self) -> int | None:
        """How often a while loop runs, where XLA could tell."""
        known = _TRIP_COUNT.search(self.attributes)
        return int(known[1]) if known else None


@dataclass(frozen=True)
class Module:
    """The computations of a program by name, each with its instructions by name; `entry` is the main one."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse_hlo(text: str) -> Module:
    """Raises ValueError where the text is no HLO module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = None
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            if header[1]:
                entry = header[2]
        elif name := _NAME.match(line):
            current[name[1]] = _instruction(name[1], line[name.end() :])
    if entry is None:
        raise ValueError("not HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    """`rest` reads `type op(operands), attributes`; types may be tuples, and layouts hold parentheses too."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result_type, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(_REFERENCE.findall(rest[opening:closing]))
    return Instruction(name, result_type, rest[:opening], operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in HLO text: {text[:200]}")


def size_of(type_text: str) -> tuple[tuple[str, ...], int]:
    """Element types and bytes of a type's text; a tuple's are those of its parts together."""
    dtypes, size = [], 0
    for dtype, dimensions, layout in _SHAPE.findall(type_text):
        if (bits := _bits(dtype, layout)) is None:  # token, opaque
            continue
        elements = 1
        for dimension in re.findall(r"\d+", dimensions):
            elements *= int(dimension)
        dtypes.append(dtype)
        size += -(-elements * bits // 8)
    return tuple(dict.fromkeys(dtypes)), size


def _bits(dtype: str, layout: str) -> int | None:
    """Bits that an element takes: four-bit types take a byte unless their layout says they are packed."""
    if packed := _ELEMENT_BITS.search(layout):
        return int(packed[1])
    if dtype == "pred":
        return 8
    width = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return None if width is None else max(8, int(width[1]))


def replica_groups(attributes: str, devices: int) -> Groups:
    """The groups of a collective, in any of XLA's three forms; none given, or `{}`, is one group of all.

    Explicit `{{0,1},{2,3}}`; iota `[2,4]<=[4,2]T(1,0)`; axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`.
    Raises ValueError where it is another form.
    """
    if iota := _IOTA.search(attributes):
        shape, dimensions = (_integers(part) for part in iota.group(1, 2))
        return _rows(_transposed_iota(dimensions, iota[3]).reshape(-1, shape[-1]))
    if mesh := _MESH.search(attributes):
        return _groups_along_axes(*mesh.groups())
    if explicit := _EXPLICIT.search(attributes):
        groups = tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,\s]*)\}", explicit[1]))
        return groups or (tuple(range(devices)),)
    if "replica_groups=" in attributes:
        form = attributes.partition("replica_groups=")[2][:80]
        raise ValueError(f"replica groups in a form that is not known here: {form}")
    return (tuple(range(devices)),)


def _transposed_iota(dimensions: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(dimensions)).reshape(dimensions)
    return ids.transpose(_integers(order)) if order else ids


def _groups_along_axes(axes: str, device_ids: str | None, used: str) -> Groups:
    """Groups along axes of a mesh, as in `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b':(2)2}`.

    The ids are in order unless given, as an iota or one by one. `'b':(2)2` is a part of axis b: of its 4 seen
    as 2 x 2 x 1 the middle one.
    """
    sizes = {name: int(size) for name, size in _AXIS_SIZE.findall(axes)}
    if device_ids is None:
        ids = np.arange(np.prod(list(sizes.values())))
    elif device_ids.startswith("["):
        dimensions, _, order = device_ids.partition("T")
        ids = _transposed_iota(_integers(dimensions), order)
    else:
        ids = np.array(_integers(device_ids))
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in sizes.items()}
    spans = [(name, int(a or 1), int(a or 1) * int(n or sizes[name])) for name, a, n in _AXIS_USED.findall(used)]
    for name, start, stop in spans:
        cuts[name] |= {start, stop}
    # Each axis falls into factors between its cuts; a factor varies within a group if a span covers it.
    factors = [(n, a, b) for n, at in cuts.items() for a, b in zip(sorted(at), sorted(at)[1:], strict=False)]
    within = [any(n == name and start <= a and b <= stop for name, start, stop in spans) for n, a, b in factors]
    by_factor = ids.reshape([b // a for _, a, b in factors])
    outside_first = sorted(range(len(factors)), key=lambda factor: within[factor])
    size = math.prod(b // a for (_, a, b), inside in zip(factors, within, strict=True) if inside)
    return _rows(by_factor.transpose(outside_first).reshape(-1, size))


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in ids.tolist())


def source_target_pairs(attributes: str) -> Groups:
    """Who sends to whom in a permutation, without the devices that send to themselves."""
    pairs = _PAIRS.search(attributes)
    assert pairs, f"a permutation without source_target_pairs: {attributes[:200]}"
    both = (_integers(pair) for pair in re.findall(r"\{([\d,\s]*)\}", pairs[1]))
    return tuple((source, target) for source, target in both if source != target)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
