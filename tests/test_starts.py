"""How sites start: the original function, whatever is on the trunk, and gradients for all from the first step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from family import relative
from mhc_rewrite import HyperConnection, MHCConfig, mhcify, plan, report
from mhc_rewrite.connections import CONNECTIONS

C, SITES = 16, 6
F64 = torch.float64
EXACT = {"deepseek_v4": 1e-4}  # its epsilons leave sums short by 1e-6 a site
# Those that are a function start where tests/test_family.py looks, for every n: in a model one n shows the rest.
FORMS = [(c, n) for c in CONNECTIONS for n in ([4] if CONNECTIONS[c].function else [2, 3, 4, 5, 8, 16])]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Chain(nn.Module):
    """Residual adds in one forward, with something on the trunk between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] = lambda model, x: x, part: nn.Module | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(SITES))
        self.between, self.part = between, part
        self.gate = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(self, x + block(x))
        return x + self.blocks[0](x)


def chain(*args: Any, dtype: torch.dtype = F64) -> tuple[Chain, Tensor]:
    torch.manual_seed(0)
    return Chain(*args).to(dtype).eval(), torch.randn(2, 5, C, dtype=dtype)


def sites(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


# -- one site --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 17))
def test_the_mean_is_kept_and_read(n: int) -> None:
    """For streams that are equal within each half, as the start makes them, by sites in any order."""
    first = math.ceil(n / 2)
    apart = torch.cat([torch.full((first,), 1 / first), torch.full((n - first,), -1 / (n - first))]).to(F64)
    X = torch.randn(7, 1, C, dtype=F64) + apart[:, None] * torch.randn(7, 1, C, dtype=F64)
    y = torch.randn(7, C, dtype=F64)
    reads, writes = set(), set()
    for index in range(2 * n):
        site = HyperConnection(C, MHCConfig(n_streams=n), index=index, dtype=F64)
        assert not site.phi.any() and torch.equal(site.alpha, torch.full((3,), 0.01, dtype=F64))
        u, mix = site.pre(X)
        assert relative(u, X.mean(-2)) < 1e-14
        new = site.post(X, y, mix)
        assert relative(new.mean(-2), X.mean(-2) + y) < 1e-14
        across = new - new.mean(-2, keepdim=True)
        assert relative(across[:, :first], across[:, :1].expand(-1, first, -1)) < 1e-13  # equal within each half
        h = site.coefficients(X)
        assert 0.2 < h.post.min() and h.post.max() < 1.8 and abs(h.post.mean().item() - 1) < 1e-14
        reads.add(tuple(h.pre[0].tolist()))
        writes.add(tuple(h.post[0].tolist()))
    assert len(reads) >= (1 if n == 2 else first) and len(writes) == 2


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connection,n", FORMS)
@pytest.mark.parametrize("init", ["preserve", "equal", "near_identity"])
def test_starts_keep_the_function(init: str, connection: str, n: int) -> None:
    for dtype in (F64, torch.float32):
        model, x = chain(dtype=dtype)
        want = model(x)
        mhcify(model, (x,), n_streams=n, connection=connection, init=init)
        exact = EXACT.get(connection, 1e-13)
        assert relative(model(x), want) < (exact if dtype is F64 else max(1e-5, exact))


def learned(n: int, init: str, steps: int = 0) -> list[dict[str, float]]:
    """Largest gradients of each mapping's bias, site by site, after so many steps of Adam."""
    model, x = chain(dtype=torch.float32)
    mhcify(model, (x,), n_streams=n, init=init)
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam([p for site in sites(model) for p in site.parameters()], 1e-3)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    found = []
    for site in sites(model):
        assert site.bias.grad is not None
        parts = site.bias.grad.abs().split([n, n, n * n])
        found.append({name: float(part.max()) for name, part in zip(("pre", "post", "res"), parts, strict=True)})
    return found


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_every_mapping_has_a_gradient(n: int) -> None:
    """But for the first site's H_res, which mixes streams that are equal yet, and the last one's, under a mean."""
    for site in learned(n, "preserve", steps=1 if n == 2 else 0)[1:-1]:
        assert site["pre"] > 1e-3 * site["post"] and site["res"] > 1e-5 * site["post"], site


def test_near_identity_is_what_it_says() -> None:
    """What the other start is for."""
    assert max(site["res"] for site in learned(4, "near_identity")[1:-1]) < 1e-8


def test_streams_part_at_the_first_site() -> None:
    model, x = chain()
    mhcify(model, (x,))
    seen = []
    for site in sites(model):
        site.register_forward_hook(lambda site, args, result: seen.append(args[0]))
    model(x)
    spread = [float(s.std(-2).norm() / s.mean(-2).norm()) for s in seen[1:] if s.shape[-2] > 1]
    assert len(spread) >= SITES - 1 and min(spread) > 0.02


# -- what is on the trunk --------------------------------------------------------------------------------------------


LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "factor": lambda model, x: 0.5 * x,
    "quotient": lambda model, x: x / 2.0,
    "quotient by name": lambda model, x: torch.div(input=x, other=2.0),
    "gate": lambda model, x: x * model.gate,
    "offset": lambda model, x: x + model.gate,
    "from a constant": lambda model, x: 1.0 - x,
    "negative": lambda model, x: -x,
    "cast and back": lambda model, x: x.double().to(x.dtype),
    "dropout": lambda model, x: F.dropout(x, 0.1, model.training),
    "mask": lambda model, x: x.masked_fill(model.gate > 1.0, 0.25),
    "where": lambda model, x: torch.where(model.gate > 1.0, x, model.gate),
    "axes": lambda model, x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a part of the tokens": lambda model, x: x[:, :-1] if x.shape[1] > 2 else x,
}
CURVED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda model, x: torch.relu(x),
    "gelu": lambda model, x: F.gelu(x),
    "norm": lambda model, x: F.layer_norm(x, (C,)),
    "normalize": lambda model, x: F.normalize(x, dim=-1),
    "clamp": lambda model, x: x.clamp(-1.0, 1.0),
    "reciprocal": lambda model, x: 2.0 / (x + 9.0),
    "reciprocal by name": lambda model, x: torch.div(other=x + 9.0, input=model.gate),
    "power": lambda model, x: (x + 9.0) ** 2 / 81.0,
    "rounded": lambda model, x: torch.div(x, 0.1, rounding_mode="floor"),
    "absolute": lambda model, x: x.abs(),
}


class Scale(nn.Module):
    """A module of the user's own that is linear, as a layer scale is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.scale


class Soft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


LINEAR_PARTS = {"identity": nn.Identity(), "own scale": Scale(), "dropout": nn.Dropout(0.1)}
CURVED_PARTS = {"post-norm": nn.LayerNorm(C), "relu": nn.ReLU(), "in place": nn.ReLU(inplace=True), "own": Soft()}


def applied(model: Any, x: Tensor) -> Tensor:
    result: Tensor = model.part(x)
    return result


CASES = [
    *((name, True, between, None) for name, between in LINEAR.items()),
    *((f"{name}, a module", True, applied, part) for name, part in LINEAR_PARTS.items()),
    *((name, False, between, None) for name, between in CURVED.items()),
    *((f"{name}, a module", False, applied, part) for name, part in CURVED_PARTS.items()),
]


@pytest.mark.parametrize("name,linear,between,part", CASES, ids=[case[0] for case in CASES])
def test_trunk(name: str, linear: bool, between: Any, part: nn.Module | None) -> None:
    """Streams part where what they pass keeps their mean, and else start equal; the function is kept either way."""
    model, x = chain(between, copy.deepcopy(part))
    original = copy.deepcopy(model)
    made = report(mhcify(model, (x,)))
    (stream,) = made.plan.streams
    assert len(stream.sites) >= SITES, made
    assert bool(stream.nonlinear) is not linear, (stream.lifted, stream.nonlinear)
    assert {site.config.init for site in sites(model)} == {"preserve" if linear else "equal"}
    assert ("starts with equal streams" in str(made)) is not linear
    assert set(stream.nonlinear) <= set(stream.lifted)
    for training in (False, True):
        torch.manual_seed(1)
        want = original.train(training)(x)
        torch.manual_seed(1)
        assert relative(model.train(training)(x), want) < 1e-12, training


def test_a_wrong_start_would_show() -> None:
    """What the table of linear operations is for: streams that part do not survive a relu."""
    model, x = chain(CURVED["relu"])
    want = model(x)
    mhcify(model, (x,))
    for index, site in enumerate(sites(model)):
        CONNECTIONS["mhc"].starts["preserve"](*(p.data for p in (site.phi, site.alpha, site.bias)), 4, index)
    assert relative(model(x), want) > 1e-4


def test_only_what_lies_between_sites_counts() -> None:
    """A relu in front of the first site and a norm behind the last one are on no stream."""

    class Around(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(super().forward(torch.relu(x)), (C,))

    torch.manual_seed(0)
    model, x = Around().double(), torch.randn(2, 5, C, dtype=F64)
    (stream,) = plan(model, (x,)).streams
    assert stream.nonlinear == () and stream.start("preserve") == "preserve"


def test_the_start_asked_for_is_the_one_taken() -> None:
    model, x = chain(CURVED["relu"])
    made = report(mhcify(model, (x,), init="near_identity"))
    assert {site.config.init for site in sites(model)} == {"near_identity"}
    assert "starts with equal streams" not in str(made)
