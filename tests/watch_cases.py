"""What tests/test_watch_modes.py runs in each of two processes: what they see together is what one sees of all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mhc_rewrite import watch
from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.watching.format import read
from watched_models import X, agree, line_of, loss_of, model


def expected() -> dict[str, Any]:
    """Of one process that has the whole batch: each says so of itself."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return line_of(model(), X, group=alone[dist.get_rank()])


def together(converted: Any, wrapped: Any) -> None:
    part = X.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    file = Path(folder[0]) / "run.jsonl"
    with watch(wrapped, tokens=1000, to=file) as seen:
        assert seen.next_step == 0
        loss: Tensor = loss_of(wrapped(part))
        loss.backward()
        seen.step(loss)
    assert (seen.line is not None) == (dist.get_rank() == 0)
    of_all = expected()
    if seen.line is not None:
        agree(seen.line, of_all, rel=2e-2)
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


def files() -> None:
    """All processes go on at the same step, and none goes on where one can't."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    file = Path(folder[0]) / "run.jsonl"
    for first, last in ((0, 3), (3, 5)):
        converted = model()
        with watch(converted, every=2, to=file, resume=first > 0) as seen:
            assert seen.next_step == first
            for _ in range(first, last):
                loss_of(converted(X)).backward()
                seen.step()
    with pytest.raises(RunFileError, match="is there already"):
        watch(model(), to=file)
    assert read(file).steps == [0, 2, 4]
