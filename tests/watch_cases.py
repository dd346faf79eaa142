"""What tests/test_watch_modes.py runs in each of two processes: what they see together is what one sees of all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mhc_rewrite import watch
from mhc_rewrite.insight.watching.format import read
from watched_models import X, agree, line_of, loss_of, model


def expected() -> dict[str, Any]:
    """Of one process that has the whole batch."""
    with mock.patch.object(dist, "is_initialized", lambda: False):
        return line_of(model(), X)


def together(converted: Any, wrapped: Any) -> None:
    part = X.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    file = Path(folder[0]) / "run.jsonl"
    with watch(wrapped, tokens=1000, to=file) as seen:
        loss: Tensor = loss_of(wrapped(part))
        loss.backward()
        seen.step(loss)
    assert (seen.line is not None) == (dist.get_rank() == 0)
    if seen.line is not None:
        agree(seen.line, {**expected(), "loss": seen.line["loss"]}, rel=2e-2)
        assert abs(seen.line["loss"] - expected()["loss"]) < 1e-5
        run = read(file)
        assert len(run.samples) == 1 and run.end == "finished"


def ddp() -> None:
    converted = model()
    together(converted, DistributedDataParallel(converted))


def ddp_in_a_checkpoint() -> None:
    converted = model()
    converted.reentrant = False
    together(converted, DistributedDataParallel(converted))


def fsdp() -> None:
    from mhc_rewrite.distributed import shard_sites

    converted = model()
    shard_sites(converted)
    for layer in converted.layers:
        fully_shard(layer)
    fully_shard(converted)
    together(converted, converted)
