"""What `jaxdist train` prints before and after the run."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxdist.data.baselines import MAX_VOCABULARY, token_windows, unigram_and_bigram
from jaxdist.run import Built
from jaxdist.runtime import job
from jaxdist.sync.pipeline.facts import Facts, lines
from jaxdist.telemetry.flops import mfu_formula
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.trained import build_run, text_of

BASELINE_WINDOWS = 100_000  # enough for a table of pairs, whatever the size of the data


def begin(built: Built, kept_buffers: bool) -> Iterator[str]:
    """What is about to run, and on text what a model must beat."""
    config, strategy, topology = built.config, built.strategy, built.topology
    kinds = ", ".join(sorted({d.device_kind for d in topology.devices}))
    yield f"run       {config.name} in {config.run_dir}"
    yield f"devices   {len(topology.devices)} x {kinds}, {topology.num_processes} process(es)"
    if kept_buffers:
        yield "allocator glibc told to keep big buffers (GLIBC_TUNABLES; set it yourself to have your own)"
    params = jax.tree.leaves(strategy.abstract_state().params)
    yield f"model     {sum(p.size for p in params):,} parameters"
    if (facts := facts_of(built)) is not None:
        yield f"pipeline  {next(lines(facts)).removeprefix('Pipeline: ')}, bubble {facts.bubble:.1%}"
    yield f"data      {len(built.data.train):,} training and {len(built.data.validation):,} validation samples"
    vocabulary = built.data.info.vocabulary
    both = len(built.data.train) and len(built.data.validation)
    if vocabulary is not None and vocabulary <= MAX_VOCABULARY and both:
        unigram, bigram = unigram_and_bigram(
            token_windows(built.data.train, BASELINE_WINDOWS),
            token_windows(built.data.validation, BASELINE_WINDOWS),
            vocabulary,
        )
        yield f"to beat   {unigram:.2f} nats a token by frequency alone, {bigram:.2f} knowing the token before"


def facts_of(built: Built) -> Facts | None:
    """Of its pipeline, if it has one."""
    return getattr(built.strategy, "pipeline_facts", None)


def dry_run(built: Built) -> Iterator[str]:
    """What has been found to build and compile."""
    facts = facts_of(built)
    yield from () if facts is None else lines(facts)
    yield "builds and compiles"


def end(built: Built, finished: LoadedRun) -> Iterator[str]:
    """What came out, and a sample of text if the config asks for one."""
    sample = built.config.telemetry.sample
    text = None
    mine = job.current()
    if mine is not None and len(mine.members) < mine.count:
        sample = None  # what was built is built for processes that are lost
    if sample is not None:
        here = built
        if facts_of(built) is not None:  # its parameters lie over the stages: they are read anew, without
            here = build_run(built.config.run_dir)
        text = text_of(
            here,
            built.config.run_dir,
            sample.prompt,
            tokens=sample.tokens,
            temperature=sample.temperature,
            seed=built.config.seed,
            tokenizer=sample.tokenizer,
        )
    if not built.topology.is_first:
        return
    summary: dict[str, Any] = finished.summary
    if not summary:
        return
    final = summary["final"]
    if summary["reason"] == "target":
        yield f"reached   {built.config.train.stop_at}"
    spent = ", ".join(f"{name} {value:.4g}" for name, value in final.items() if name.startswith("epsilon."))
    if spent:
        last = "; another round would be too much" if summary["reason"] == "epsilon" else ""
        yield f"privacy   {spent} spent{last}"
    values = {k: final[k] for k in ("loss", "eval.loss", "eval.accuracy") if k in final}
    yield ("done      " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()) + f" after {summary['steps']} steps")
    seconds = {k: v for k, v in summary["seconds"].items() if v}
    yield "seconds   " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    memory = summary["peak_memory"]
    yield f"memory    at most {memory['bytes'] / 2**20:,.0f} MiB ({memory['of']})"
    if summary["utilisation"]:
        yield mfu_formula(**summary["utilisation"])
    if sample is not None and text is not None:
        yield f"sample    {sample.prompt!r} continues:"
        yield text
