"""Trunks within blocks, beside one another and on parts of one another, against n-stream models by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import oracle
from handmade import nested
from handmade.common import WIDTH, Kind, features
from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import NoResidualError
from test_perturbed import check_by_hand


@pytest.mark.parametrize("kind", (*nested.KINDS, *nested.ADAPTED), ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    found = plan(kind.model(), kind.arguments())
    assert tuple(tuple(site.name for site in stream.sites) for stream in found.streams) == kind.streams
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}
    check_by_hand(kind, 4)


@pytest.mark.parametrize("given,how", [((), {"axis": 2}), ((2,), {})], ids=("by keyword", "by position"))
def test_a_child_is_tried_as_it_is_called(given: tuple[int, ...], how: dict[str, int]) -> None:
    """A norm over the third axis is over streams where there are some, whatever it does by default."""
    model = nested.CalledStack(lambda: nested.Called(False, *given, **how)).double()
    with pytest.raises(NoResidualError, match="one site alone"):
        mhcify(model, (features(2, 6, WIDTH),))


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_a_child_that_gives_back_something_else_later(compiled: bool) -> None:
    kind = nested.ADAPTED[1]
    model, (x,) = kind.model(), kind.arguments()
    converted = mhcify(copy.deepcopy(model), (x,))
    oracle.perturb(converted)
    model.layers[1].adapter.on = converted.layers[1].adapter.on = True
    hand = oracle.Streams(dict(oracle.site_parameters(converted)), 4)
    run = torch.compile(converted, fullgraph=True, backend="eager") if compiled else converted
    torch.testing.assert_close(run(x), kind.by_hand(model, hand, x))
