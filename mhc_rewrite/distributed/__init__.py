"""What a converted model needs on several devices beside torch.distributed itself."""

from mhc_rewrite.distributed.check import check_sites
from mhc_rewrite.distributed.fsdp import shard_sites
from mhc_rewrite.distributed.pipeline import pipeline_stage
from mhc_rewrite.distributed.tensor import SiteParallel

__all__ = ["SiteParallel", "check_sites", "pipeline_stage", "shard_sites"]
