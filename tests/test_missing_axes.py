"""Branches that lack a leading axis of size 1, which the sum with the trunk gives back to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import oracle
import sweep
import sweep_oracle
from handmade.common import WIDTH, Kind, Stack, features, names, stack_by_hand
from handmade.found import block
from mhc_rewrite import mhcify, plan, report
from test_perturbed import check_by_hand


class Squeezed(nn.Module):
    """Attention on one picture's tokens without their batch, in one of some spellings."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.f, self.g, self.form = block(), block(), form

    def branch(self, x: Tensor) -> Tensor:
        return torch.softmax(x[0] @ x[0].mT, -1) @ self.f(x).squeeze(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.form == "x + y":
            x = x + y
        elif self.form == "y + x":
            x = y + x
        elif self.form == "x += y":
            x = x.clone()
            x += y
        else:
            x = torch.add(x, y, alpha=2)
        return x + self.g(x)


FORMS = ("x + y", "y + x", "x += y", "alpha")


def by_hand(layer: Squeezed, hand: oracle.Streams, name: str, X: Tensor) -> Tensor:
    factor = 2 if layer.form == "alpha" else 1
    X = hand.site(f"{name}.mhc_0", X, lambda u: factor * layer.branch(u)[None])
    return hand.site(f"{name}.mhc_1", X, layer.g)


def kind(form: str) -> Kind:
    return Kind(form, lambda: Stack([Squeezed(form) for _ in range(2)]), lambda: (features(1, 5, WIDTH),),
                stack_by_hand(by_hand), (names("layers.{}", 2, 2),))  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_equals_hand_written(form: str) -> None:
    one = kind(form)
    found = plan(one.model(), one.arguments())
    assert tuple(tuple(site.name for site in stream.sites) for stream in found.streams) == one.streams
    check_by_hand(one, 4)


@pytest.mark.parametrize("form", FORMS[:2])
def test_other_lengths_and_the_sweep(form: str) -> None:
    one = kind(form)
    model = one.model()
    converted = mhcify(copy.deepcopy(model), one.arguments())
    oracle.perturb(converted)
    state = dict(oracle.site_parameters(converted))
    x = features(1, 9, WIDTH)
    torch.testing.assert_close(converted(x), one.by_hand(model, oracle.Streams(state, 4), x))
    run = sweep_oracle.Run(model, (x,), {})
    parameters = {name: oracle.site_params(state, name) for name in one.sites()}
    wanted = sweep_oracle.tensors_of(run.replay(report(converted).plan.streams, parameters, 4, 1e-6))
    assert sweep._error([converted(x)], wanted) < 1e-12
