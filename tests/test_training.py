"""What training does to a converted model: the streams part, random states are kept, weight decay spares the sites."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from handmade.common import PreNorm, Stack, features, tokens
from handmade.forms import LayerScale, TrunkDropout
from handmade.layers import GPT, torch_encoder
from mhc_rewrite import mhcify, parameter_groups
from mhc_rewrite.sites.state import streams_of

STEPS = 50


def spread(X: Tensor) -> float:
    """How far the streams (..., n, C) are from their mean, relative to it."""
    mean = X.mean(dim=-2, keepdim=True)
    return float((X - mean).norm() / (math.sqrt(X.shape[-2]) * mean.norm()))


def trained(prepare: Callable[[nn.Module], None] = lambda model: None) -> tuple[float, float, list[float]]:
    """Trains a converted GPT; the spread after its middle layer before and after, and the losses."""
    torch.manual_seed(0)
    ids = tokens(4, 8)
    model = mhcify(GPT(layers=3).double(), (ids,), n_streams=4)
    prepare(model)
    states: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda module, inputs, output: states.append(streams_of(output).detach()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(state.shape == (4, 7, 4, 16) for state in states), "the streams are (B, T, n, C)"
    return spread(states[0]), spread(states[-1]), losses


def test_streams_diverge() -> None:
    start, end, losses = trained()
    assert losses[-1] < 0.9 * losses[0]
    assert end > 1e-3
    assert end > start


@torch.no_grad()
def equal_streams(model: nn.Module) -> None:
    """H_pre = 1/n and H_post = 1 everywhere: still the original function, and no stream ever differs from another."""
    for name, p in oracle.site_parameters(model):
        if name.endswith(".bias"):
            n = math.isqrt(p.shape[0] + 1) - 1
            p[:n] = -math.log(n - 1)
            p[n : 2 * n] = 0.0


def test_equal_coefficients_keep_streams_equal() -> None:
    """The check above can fail."""
    _, end, losses = trained(equal_streams)
    assert losses[-1] < 0.9 * losses[0]
    assert end < 1e-6


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize(
    "build,inputs",
    [
        (lambda: GPT(layers=2, dropout=0.2), lambda: (tokens(),)),
        (lambda: Stack([TrunkDropout() for _ in range(2)]), lambda: (features(2, 5, 16),)),
        (lambda: Stack([LayerScale() for _ in range(2)]), lambda: (features(2, 5, 16),)),
        (lambda: dropout_everywhere(torch_encoder(True)), lambda: (features(2, 5, 16),)),
        (lambda: dropout_everywhere(torch_encoder(False)), lambda: (features(2, 5, 16),)),
    ],
    ids=("in the branches", "on the trunk", "drop-path", "torch encoder, norm first", "torch encoder, norm last"),
)
def test_dropout_is_the_originals(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], n: int
) -> None:
    """In train mode, at initialisation, the same random state gives the same outputs and leaves the same state."""
    outputs, states = [], []
    for convert in (False, True):
        torch.manual_seed(0)
        model, arguments = build().double().train(), inputs()
        if convert:
            mhcify(model, arguments, n_streams=n)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model(*arguments).detach())
            states.append(torch.get_rng_state())
        assert torch.equal(runs[0], runs[1])
        assert not torch.allclose(runs[0], runs[2]), "there is no dropout in the model"
        outputs.append(runs)
    for want, got in zip(*outputs):
        assert float((got - want).norm() / want.norm()) <= 1e-10
    assert all(torch.equal(mine, other) for mine, other in zip(states[:3], states[3:]))


def dropout_everywhere(model: nn.Module) -> nn.Module:
    """torch's encoder with its dropouts turned on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.2
    return model


def small() -> nn.Module:
    """Two converted pre-norm layers."""
    torch.manual_seed(0)
    return mhcify(Stack([PreNorm() for _ in range(2)]).double(), (features(2, 5, 16),))


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = small()
    groups = parameter_groups(model, weight_decay=0.1)
    torch.optim.AdamW(groups, lr=1e-3)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    sites = {id(p) for _, p in oracle.site_parameters(model)}
    assert {decay[p] for p in sites} == {0.0}
    weights = {id(p) for p in model.parameters() if id(p) not in sites and p.dim() > 1}  # others: norms and biases
    assert {decay[p] for p in weights} == {0.1}
    assert {decay[p] for p in decay.keys() - sites - weights} == {0.0}


@pytest.mark.parametrize("grouped", (True, False))
def test_weight_decay_spares_the_sites(grouped: bool) -> None:
    """With gradients of zero only weight decay moves a parameter: without the groups it pulls b_res from -8 to 0."""
    model = small()
    parameters = parameter_groups(model, weight_decay=0.1) if grouped else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(10):
        optimizer.step()
    after = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    biases = {name for name, _ in oracle.site_parameters(model) if name.endswith(".bias")}
    assert "layers.0.mlp.up.weight" in moved
    assert biases.isdisjoint(moved) if grouped else biases <= moved


def test_parameters_that_do_not_train_are_no_obstacle() -> None:
    """A frozen model: only the sites train."""
    torch.manual_seed(0)
    model = Stack([PreNorm() for _ in range(2)]).double().requires_grad_(False)
    x = features(2, 5, 16)
    mhcify(model, (x,))
    model(x).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in oracle.site_parameters(model)}
