"""The table of connections: one relative of mHC, one file here and one line below."""

from mhc_rewrite.connections.base import Coefficients, Connection
from mhc_rewrite.connections.hc import HC
from mhc_rewrite.connections.mhc import MHC

CONNECTIONS: dict[str, Connection] = {
    "mhc": MHC,
    "hc": HC,
}

__all__ = ["CONNECTIONS", "Coefficients", "Connection"]
