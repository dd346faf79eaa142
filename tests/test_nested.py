"""Trunks within blocks, beside one another and on parts of one another, against n-stream models by hand."""

from __future__ import annotations

import pytest

from handmade import nested
from handmade.common import WIDTH, Kind, features
from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import NoResidualError
from test_perturbed import check_by_hand


@pytest.mark.parametrize("kind", nested.KINDS, ids=str)
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
