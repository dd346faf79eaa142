"""Rewrites the residual streams of PyTorch models into manifold-constrained hyper-connections (arXiv:2512.24880)."""

from mhc_rewrite.api import graphs, mhcify, parameter_groups, plan, report, unmhcify
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.lowering import compile
from mhc_rewrite.sites.hyper_connection import HyperConnection

__version__ = "0.1.0"

__all__ = [
    "HyperConnection",
    "MHCConfig",
    "compile",
    "graphs",
    "mhcify",
    "parameter_groups",
    "plan",
    "report",
    "unmhcify",
]
