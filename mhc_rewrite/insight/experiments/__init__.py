"""Experiments that decide: one a file here, and one line below."""

from mhc_rewrite.insight.experiments.base import Experiment, Result
from mhc_rewrite.insight.experiments.run import run
from mhc_rewrite.insight.experiments.start import START

EXPERIMENTS: dict[str, Experiment] = {"start": START}

__all__ = ["EXPERIMENTS", "Experiment", "Result", "run"]
