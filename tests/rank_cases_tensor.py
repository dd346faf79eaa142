"""What tests/test_distributed_tensor.py runs in every one of its processes: tensor and sequence parallelism.

A decoder in the form of torchtitan's: heads and the MLP are sharded, and between those regions every rank has a part of
the tokens, as plain local tensors or as DTensors. All is compared with one process.
"""

from __future__ import annotations

import torch.nn.functional as F
