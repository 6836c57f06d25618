"""What a doctor says, and how it reads."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxdist.runtime.exit_codes import DONE, FAILED

Level = Literal["ok", "note", "warning", "problem"]
Facts = dict[str, Any]  # what one rank saw, by name; a name that is missing was not gathered
Ranks = Mapping[int, Facts]  # by rank


@dataclass(frozen=True)
class Finding:
    """Something that is so; `text` also says what to do, unless the level is ok."""

    level: Level
    check: str
    text: str
    ranks: tuple[int, ...] = ()  # () for the job as a whole
    values: Mapping[str, Any] = field(default_factory=dict)  # numbers behind it, for --json


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    hosts: dict[int, str]  # by rank, of the ranks that came
    num_processes: int

    @property
    def exit_code(self) -> int:
        return FAILED if any(finding.level == "problem" for finding in self.findings) else DONE

    def lines(self) -> Iterator[str]:
        for finding in self.findings:
            who = self.who(finding.ranks) if self.num_processes > 1 else ""
            yield f"{finding.level:<7}  {finding.check:<11}  {who}{': ' if who else ''}{finding.text}"
        for level in ("problem", "warning"):
            count = sum(finding.level == level for finding in self.findings)
            yield f"{count} {level}{'' if count == 1 else 's'}"

    def who(self, ranks: tuple[int, ...]) -> str:
        """ "rank 3 (gpu-7)", "ranks 0-2, 5 (gpu-0, gpu-1)", "all ranks"; "" for the job as a whole."""
        if not ranks:
            return ""
        if len(ranks) == self.num_processes:
            return "all ranks"
        hosts = list(dict.fromkeys(self.hosts[rank] for rank in ranks if rank in self.hosts))
        shown = ", ".join([*hosts[:4], *(["..."] if len(hosts) > 4 else [])])
        return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}" + (f" ({shown})" if shown else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "processes": self.num_processes,
            "hosts": {str(rank): host for rank, host in sorted(self.hosts.items())},
            "findings": [
                {"level": f.level, "check": f.check, "text": f.text, "ranks": list(f.ranks), "values": dict(f.values)}
                for f in self.findings
            ],
            "exit_code": self.exit_code,
        }


def spans(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """What several ranks found alike becomes one finding of all of them."""
    first: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = finding.level, finding.check, finding.text
        if key in first:
            everyone = tuple(sorted({*first[key].ranks, *finding.ranks}))
            first[key] = replace(first[key], ranks=everyone)
        else:
            first[key] = finding
    return list(first.values())


def known(ranks: Ranks, name: str) -> Iterator[tuple[int, Any]]:
    """(rank, its fact of that name) of the ranks that have it."""
    return ((rank, facts[name]) for rank, facts in ranks.items() if name in facts)


def by_value(values: Mapping[int, Any]) -> dict[Any, list[int]]:
    """Ranks by what they have, the commonest first."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return dict(sorted(ranks.items(), key=lambda item: -len(item[1])))
