"""Rewrites the residual streams of PyTorch models into manifold-constrained hyper-connections (arXiv:2512.24880)."""

from mhc_rewrite.api import graphs, mhcify, plan, report, unmhcify
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.lifecycle.optim import modules_to_save, parameter_groups
from mhc_rewrite.lifecycle.portable import portable
from mhc_rewrite.lowering import compile
from mhc_rewrite.sites.hyper_connection import HyperConnection

__version__ = "0.1.0"

__all__ = [
    "HyperConnection",
    "MHCConfig",
    "compile",
    "graphs",
    "mhcify",
    "modules_to_save",
    "parameter_groups",
    "plan",
    "portable",
    "report",
    "unmhcify",
]
