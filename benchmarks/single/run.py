"""jaxdist's training step beside PyTorch's on CPU, in turn, in one run; with --gpu, what jaxdist does on one GPU.

A pair is the same model, batch, optimizer settings, precision (fp32) and number of threads in both. All
contenders of a pair are built and warmed up first, then take turns; rounds are compared, so that a drifting
machine does not decide. A step is forward, backward and update; the loss is read after the last of a round.

    python benchmarks/single/run.py [--rounds 9] [--only gpt cnn ddp] [--plain-malloc] [--profile] [--markdown FILE]
    python benchmarks/single/run.py --gpu [--markdown FILE]
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
from page import describe_machine, log, table, warn_if_busy, write_page

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


def start(name: str, pair: Pair, cores: list[int], overrides: list[str], *, kept_buffers: bool) -> Contender:
    if name == OURS:
        script, arguments = JAXDIST, [pair.model, *overrides]
    else:
        script, arguments = TORCH, [pair.model, "compiled" if name == COMPILED else "eager"]
    label = name if kept_buffers else f"{name}, glibc's own malloc"
    contender = Contender(label, script, arguments, cores, kept_buffers=kept_buffers, processes=pair.processes)
    log(f"  {label}: {contender.about}, {pair.processes} process(es), cores {cores}")
    return contender


def run_pair(pair: Pair, args: argparse.Namespace, cores: list[int]) -> str:
    """Every contender in turn, round by round; a Markdown table of what came out."""
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
    reached = "reached" if statistics.median(ours) >= pair.target else "missed"
    header = ["", "seconds a step, median", "best", f"{pair.baseline} / this, median", "range", "loss"]
    verdict = f"jaxdist is {statistics.median(ours):.2f}x {pair.baseline} (at least {pair.target}x asked: {reached})."
    return f"## {pair.title}\n\n{table(header, rows)}\n\n{verdict}"


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


def profile(args: argparse.Namespace, cores: list[int]) -> str:
    """The operations of the GPT's step one by one, forward and backward, in both."""
    log("\n## Operations of the GPT's step, forward and backward")
    pair, rows = PAIRS["gpt"], []
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(start(name, pair, cores, args.override, kept_buffers=True)) for name in (EAGER, OURS)
        ]
        for case in both[1].cases:
            times = take_turns(both, case, 3 if case == "step" else 20, args.rounds, args.warm_up)
            torch, ours = (statistics.median(t[i].seconds for t in times) for i in range(2))
            rows.append([case, f"{torch * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{torch / ours:.2f}"])
    slower = [row[0] for row in rows if float(row[3]) < 1]
    header = ["operation", "PyTorch, ms", "jaxdist, ms", "PyTorch / jaxdist"]
    verdict = f"jaxdist is slower in: {', '.join(slower) or 'none'}."
    return f"## Operations\n\nMedians, forward and backward.\n\n{table(header, rows)}\n\n{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="untimed rounds")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=2, help="cores used, shared by a job's processes")
    parser.add_argument("--plain-malloc", action="store_true", help="each contender without the malloc settings too")
    parser.add_argument("--profile", action="store_true", help="the operations one by one, in place of the pairs")
    parser.add_argument("--gpu", action="store_true", help="jaxdist alone on one GPU, in place of the pairs")
    parser.add_argument("--models", nargs="+", choices=gpu.SWEEPS, default=list(gpu.SWEEPS), help="with --gpu")
    parser.add_argument("--override", action="append", default=[], metavar="a.b=value", help="of jaxdist's config")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as a page")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    warning = "" if args.gpu else warn_if_busy()
    log(f"{(machine := describe_machine(gpu=args.gpu))}\n{warning}")
    if not args.gpu:
        both = "GLIBC_TUNABLES of `jaxdist train` in both" + (", and without" if args.plain_malloc else "")
        log(f"optimizer {cases.ADAM}, fp32, {len(cores)} threads in all, {both}")
    if args.gpu:
        sections = [gpu.sweep(name, args.override) for name in args.models]
    elif args.profile:
        sections = [profile(args, cores)]
    else:
        sections = [run_pair(PAIRS[name], args, cores) for name in args.only]
    log("\n" + "\n\n".join(sections))
    if args.markdown:
        write_page(args.markdown, sys.argv, machine, warning, sections)


if __name__ == "__main__":
    main()
