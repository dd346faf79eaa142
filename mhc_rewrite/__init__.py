"""Rewrites the residual streams of PyTorch models into manifold-constrained hyper-connections (arXiv:2512.24880)."""

import importlib
from typing import Any

from mhc_rewrite.api import graphs, mhcify, plan, report, unmhcify
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.connections import Connection, register_connection
from mhc_rewrite.connections.base import gates
from mhc_rewrite.conversion.install import is_converted
from mhc_rewrite.lifecycle.optim import modules_to_save, parameter_groups
from mhc_rewrite.lifecycle.portable import portable
from mhc_rewrite.lifecycle.sites import load_sites, save_sites, site_parameters
from mhc_rewrite.lowering import compile
from mhc_rewrite.sites.hyper_connection import HyperConnection
from mhc_rewrite.version import VERSION as __version__

__all__ = [
    "Connection",
    "HyperConnection",
    "MHCConfig",
    "__version__",
    "ablate",
    "compile",
    "draw",
    "gates",
    "graphs",
    "is_converted",
    "load_sites",
    "mhcify",
    "modules_to_save",
    "parameter_groups",
    "plan",
    "portable",
    "register_connection",
    "report",
    "save_sites",
    "site_parameters",
    "stream_lens",
    "unmhcify",
    "watch",
    "write_report",
]

# What looks at models is imported when it is first asked for.
_LATER = {
    "ablate": "mhc_rewrite.insight.ablation",
    "draw": "mhc_rewrite.insight.drawing",
    "stream_lens": "mhc_rewrite.insight.lens",
    "watch": "mhc_rewrite.insight.watching.recording",
    "write_report": "mhc_rewrite.insight.report.writing",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
