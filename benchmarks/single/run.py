"""jaxdist's training step beside PyTorch's on CPU, in turn, in one run; with --gpu, what jaxdist does on one GPU.

A pair is the same model, batch, optimizer settings, precision (fp32) and number of threads in both. All
contenders of a pair are built and warmed up first, then take turns; rounds are compared, so that a drifting
machine does not decide. A step is forward, backward and update; the loss is read after the last of a round.

    python benchmarks/single/run.py [--rounds 9] [--only gpt cnn ddp] [--plain-malloc] [--profile] [--markdown FILE]
    python benchmarks/single/run.py --gpu [--models gpt2 llama llama_7b] [--markdown FILE]

`--only` without a name and `--profile`: the operations alone. Beside FILE, as .log, goes every round as it was.
"""

import argparse
import contextlib
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import cases
import gpu
from contender import Contender, Timing
from page import facts, keep_log, log, table, warn_if_busy, write_page

TORCH, JAXDIST = "torch_steps.py", "jaxdist_steps.py"
EAGER, COMPILED, DDP, OURS = "PyTorch eager", "PyTorch compiled", "PyTorch DDP on Gloo", "jaxdist"


@dataclass(frozen=True)
class Pair:
    title: str
    model: str  # a key of cases.BATCH
    baseline: str
    others: tuple[str, ...]
    steps: int  # of one contender in one round
    target: float  # baseline's seconds over jaxdist's, at least
    processes: int = 1


PAIRS = {
    "gpt": Pair("GPT, one process", "gpt", EAGER, (COMPILED, OURS), 5, 1.5),
    "cnn": Pair("CNN, one process", "cnn", EAGER, (COMPILED, OURS), 40, 1.0),
    "ddp": Pair("GPT, two data-parallel processes", "gpt", DDP, (OURS,), 5, 1.2, processes=2),
}


@dataclass(frozen=True)
class Outcome:
    pair: Pair
    ratios: list[float]  # baseline's seconds over jaxdist's, round by round

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        return self.ratio >= self.pair.target


def start(name: str, pair: Pair, cores: list[int], overrides: list[str], *, kept_buffers: bool) -> Contender:
    if name == OURS:
        script, arguments = JAXDIST, [pair.model, *overrides]
    else:
        script, arguments = TORCH, [pair.model, "compiled" if name == COMPILED else "eager"]
    label = name if kept_buffers else f"{name}, glibc's own malloc"
    contender = Contender(label, script, arguments, cores, kept_buffers=kept_buffers, processes=pair.processes)
    log(f"  {label}: {contender.about}, {pair.processes} process(es), cores {cores}")
    return contender


def run_pair(pair: Pair, args: argparse.Namespace, cores: list[int]) -> tuple[str, Outcome]:
    """Every contender in turn, round by round; a Markdown section of what came out."""
    log(f"\n## {pair.title}: batch {cases.BATCH[pair.model]}, {args.rounds} rounds of {pair.steps} steps each")
    with contextlib.ExitStack() as stack:
        contenders = [
            stack.enter_context(start(name, pair, cores, args.override, kept_buffers=kept))
            for kept in ((True, False) if args.plain_malloc else (True,))
            for name in (pair.baseline, *pair.others)
        ]
        rounds = take_turns(contenders, "step", pair.steps, args.rounds, args.warm_up)
    names = [contender.name for contender in contenders]
    rows = []
    for i, name in enumerate(names):
        seconds = [timings[i].seconds for timings in rounds]
        ratios = [timings[0].seconds / timings[i].seconds for timings in rounds]
        losses = f"{rounds[0][i].value:.3f} to {rounds[-1][i].value:.3f}"
        rows.append([
            name, f"{statistics.median(seconds):.4f}", f"{min(seconds):.4f}", f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}", losses,
        ])  # fmt: skip
    ours = [timings[0].seconds / timings[names.index(OURS)].seconds for timings in rounds]
    header = ["", "seconds a step, median", "best", f"{pair.baseline} / this, median", "min to max", "loss"]
    return f"## {pair.title}\n\n{table(header, rows)}", Outcome(pair, ours)


def compare(outcomes: list[Outcome], slower: dict[str, float] | None) -> str:
    """What was asked beside what was found; a line on each target that was missed.

    Args:
      slower: PyTorch / jaxdist of the GPT's operations in which jaxdist is slower; None if they were not timed.
    """
    rows, missed = [], []
    for found in outcomes:
        pair, spread = found.pair, f"{min(found.ratios):.2f} to {max(found.ratios):.2f}"
        verdict = "reached" if found.reached else "missed"
        rows.append([pair.title, pair.baseline, f"{pair.target:.2f}", f"{found.ratio:.2f}", spread, verdict])
        if not found.reached:
            longer = 100 * (pair.target / found.ratio - 1)
            missed.append(f"- {pair.title}: a step takes {longer:.0f} % too long. {_where(pair, slower)}")
    header = ["", "beside", "asked, at least", "beside / jaxdist, median", "min to max", ""]
    return "\n\n".join(["## Targets", table(header, rows), *(["Missed:\n\n" + "\n".join(missed)] if missed else [])])


def _where(pair: Pair, slower: dict[str, float] | None) -> str:
    if pair.model != "gpt":
        return "Its operations are not timed one by one."
    if slower is None:
        return "`--profile` tells in which operations."
    if not slower:
        return "None of its operations alone is slower than PyTorch's."
    return "Slower than PyTorch's: " + ", ".join(f"{name} ({ratio:.2f}x)" for name, ratio in slower.items()) + "."


def take_turns(contenders: list[Contender], case: str, steps: int, rounds: int, warm_up: int) -> list[list[Timing]]:
    """[round][contender]. The order turns by one each round, so that nobody always follows the same other."""
    for contender in contenders:
        contender.time(case, steps)  # compiles
        contender.time(case, warm_up * steps)
    measured: list[list[Timing]] = []
    for number in range(rounds):
        first = number % len(contenders)
        order = [*range(first, len(contenders)), *range(first)]
        timings = {i: contenders[i].time(case, steps) for i in order}
        measured.append([timings[i] for i in range(len(contenders))])
        shown = "; ".join(f"{c.name} {t.seconds * 1e3:.3f} ms" for c, t in zip(contenders, measured[-1], strict=True))
        log(f"  {case} round {number + 1}: {shown}; load {os.getloadavg()[0]:.1f}")
    return measured


def profile(args: argparse.Namespace, cores: list[int]) -> tuple[str, dict[str, float]]:
    """The operations of the GPT's step one by one, forward and backward, in both: a section, and the slower ones."""
    log("\n## Operations of the GPT's step, forward and backward")
    pair, rows, slower = PAIRS["gpt"], [], {}
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(start(name, pair, cores, args.override, kept_buffers=True)) for name in (EAGER, OURS)
        ]
        for case in both[1].cases:
            times = take_turns(both, case, 3 if case == "step" else 20, args.rounds, args.warm_up)
            torch, ours = (statistics.median(t[i].seconds for t in times) for i in range(2))
            ratios = [t[0].seconds / t[1].seconds for t in times]
            ratio, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append([case, f"{torch * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{ratio:.2f}", spread])
            if ratio < 1 and case != "step":
                slower[case] = ratio
    header = ["operation", "PyTorch eager, ms", "jaxdist, ms", "PyTorch / jaxdist, median", "min to max"]
    verdict = f"jaxdist is slower in: {', '.join(slower) or 'none'}."
    return f"## Operations\n\nForward and backward, each alone.\n\n{table(header, rows)}\n\n{verdict}", slower


def beside_pytorch(args: argparse.Namespace) -> list[str]:
    """The pairs, the operations if asked for, and first of all what was asked."""
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    both = "GLIBC_TUNABLES of `jaxdist train` in both" + (", and without" if args.plain_malloc else "")
    log(f"optimizer {cases.ADAM}, fp32, {len(cores)} threads in all, {both}")
    pairs = [run_pair(PAIRS[name], args, cores) for name in args.only]
    operations, slower = profile(args, cores) if args.profile else ("", None)
    targets = compare([outcome for _, outcome in pairs], slower) if pairs else ""
    return [section for section in (targets, *(section for section, _ in pairs), operations) if section]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="untimed rounds")
    parser.add_argument("--only", nargs="*", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=2, help="cores used, shared by a job's processes")
    parser.add_argument("--plain-malloc", action="store_true", help="each contender without the malloc settings too")
    parser.add_argument("--profile", action="store_true", help="the GPT's operations one by one too")
    parser.add_argument("--gpu", action="store_true", help="jaxdist alone on one GPU, in place of the pairs")
    parser.add_argument("--models", nargs="+", choices=gpu.SWEEPS, default=list(gpu.SWEEPS), help="with --gpu")
    parser.add_argument("--override", action="append", default=[], metavar="a.b=value", help="of jaxdist's config")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page, and the raw log beside it")
    args = parser.parse_args()
    if not (args.gpu or args.only or args.profile):
        parser.error("--only without a name leaves nothing to run; add --profile")
    raw_log = args.markdown and args.markdown.with_suffix(".log")
    with keep_log(raw_log):
        known, warning = facts(gpu=args.gpu), "" if args.gpu else warn_if_busy()
        log("\n".join(f"{name}: {value}" for name, value in known.items()) + f"\n{warning}")
        sections = [gpu.sweep(name, args.override) for name in args.models] if args.gpu else beside_pytorch(args)
        log("\n" + "\n\n".join(sections))
    if raw_log:
        write_page(args.markdown, sys.argv, known, raw_log, warning, sections)


if __name__ == "__main__":
    main()
