"""The table of connections: one relative of mHC, one file here and one line below."""

from mhc_rewrite.connections.base import CONNECTIONS, STARTS, Connection, connection_of, register_connection
from mhc_rewrite.connections.cayley import CAYLEY
from mhc_rewrite.connections.deepseek_v4 import DEEPSEEK_V4
from mhc_rewrite.connections.hc import HC
from mhc_rewrite.connections.identity import IDENTITY
from mhc_rewrite.connections.kromhc import KROMHC
from mhc_rewrite.connections.mhc import MHC
from mhc_rewrite.connections.mhc_lite import MHC_LITE
from mhc_rewrite.connections.tbp import TBP

for _name, _connection in {
    "mhc": MHC,
    "deepseek_v4": DEEPSEEK_V4,
    "hc": HC,
    "identity": IDENTITY,
    "mhc_lite": MHC_LITE,
    "kromhc": KROMHC,
    "tbp": TBP,
    "cayley": CAYLEY,
}.items():
    register_connection(_name, _connection)

__all__ = ["CONNECTIONS", "STARTS", "Connection", "connection_of", "register_connection"]
