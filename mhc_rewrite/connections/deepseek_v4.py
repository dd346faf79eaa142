"""mHC in DeepSeek-V4's order: rows first and columns last, with epsilons, and H_res contracted over its first index.

As in transformers' DeepseekV4HyperConnection. There H_res is held as [in, out]; what the operators return is [out, in].
The epsilon in the last pass leaves sums of 1 - 1e-6, so that "preserve" computes the original function to 1e-6 a site.
"""

from __future__ import annotations

from mhc_rewrite.connections import mhc
from mhc_rewrite.connections.base import Connection

DEEPSEEK_V4 = Connection(mhc.MHC.starts, "DeepSeek-V4 (transformers)")
