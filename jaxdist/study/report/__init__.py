"""From run directories to one report: read, time to target, intervals, panels. It imports no jax."""

from jaxdist.study.report.build import build_report, write_report

__all__ = ["build_report", "write_report"]
