"""What a converted model needs on several devices beside torch.distributed itself."""

from mhc_rewrite.distributed.check import check_sites
from mhc_rewrite.distributed.fsdp import shard_sites
from mhc_rewrite.distributed.tensor import SiteParallel

__all__ = ["SiteParallel", "check_sites", "shard_sites"]
