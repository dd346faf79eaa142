"""Experiments that decide: one a file here, and one line below."""

from mhc_rewrite.insight.experiments.adaptive import ADAPTIVE
from mhc_rewrite.insight.experiments.base import Experiment, Findings
from mhc_rewrite.insight.experiments.connections import CONNECTIONS_COMPARED
from mhc_rewrite.insight.experiments.run import run
from mhc_rewrite.insight.experiments.scale import SCALE
from mhc_rewrite.insight.experiments.sinkhorn import SINKHORN
from mhc_rewrite.insight.experiments.stability import STABILITY
from mhc_rewrite.insight.experiments.start import START
from mhc_rewrite.insight.experiments.streams import STREAMS
from mhc_rewrite.insight.experiments.upcycle import UPCYCLE

EXPERIMENTS: dict[str, Experiment] = {
    "start": START,
    "connections": CONNECTIONS_COMPARED,
    "stability": STABILITY,
    "streams": STREAMS,
    "sinkhorn": SINKHORN,
    "upcycle": UPCYCLE,
    "adaptive": ADAPTIVE,
    "scale": SCALE,
}

__all__ = ["EXPERIMENTS", "Experiment", "Findings", "run"]
