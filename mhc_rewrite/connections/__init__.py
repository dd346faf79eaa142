"""The table of connections: one relative of mHC, one file here and one line below."""

from mhc_rewrite.connections.base import STARTS, Connection
from mhc_rewrite.connections.deepseek_v4 import DEEPSEEK_V4
from mhc_rewrite.connections.hc import HC
from mhc_rewrite.connections.mhc import MHC

CONNECTIONS: dict[str, Connection] = {
    "mhc": MHC,
    "deepseek_v4": DEEPSEEK_V4,
    "hc": HC,
}

__all__ = ["CONNECTIONS", "STARTS", "Connection"]
