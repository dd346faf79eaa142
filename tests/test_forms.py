"""Residual adds in every form that people write them in, and what is none though it looks like one.

Each form's perturbed conversion is held against a model written by hand, in both modes, values and gradients.
"""

from __future__ import annotations

import pytest

import oracle
from handmade import spellings, trunk_operations
from handmade.common import Kind
from mhc_rewrite import plan
from test_perturbed import Compared

KINDS: tuple[Kind, ...] = (*spellings.KINDS, *trunk_operations.KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sites(kind: Kind) -> None:
    found = plan(kind.model(), kind.arguments())
    assert tuple(tuple(dict.fromkeys(s.name for s in stream.sites)) for stream in found.streams) == kind.streams
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    compared = Compared(kind, 4)
    assert sorted(oracle.site_names(compared.converted.state_dict())) == sorted(kind.sites())
    for train in (False, True):
        compared.train(train).check_preserved()
    compared.perturb()
    for train in (False, True):
        compared.train(train).check_perturbed()
