"""One site: its formulas, shapes, dtypes and starts."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import connections_by_hand
from mhc_rewrite import HyperConnection, MHCConfig
from mhc_rewrite.connections import CONNECTIONS
from mhc_rewrite.errors import MHCError

WIDTH = 6
STREAMS = (1, 2, 3, 4, 5, 16)
LEADING = {-1: (2, 3), 1: (2,)}  # what stands before n in the state
BEHIND = {-1: (), 1: (3, 2)}  # what stands behind C


class Form(NamedTuple):
    """A site's kind."""

    connection: str = "mhc"
    n: int = 4
    channel_dim: int = -1


FORMS = [Form(c, n, dim) for c in CONNECTIONS for n in STREAMS if not CONNECTIONS[c].refuses(n) for dim in (-1, 1)]
FEW = {c: 4 if CONNECTIONS[c].refuses(3) else 3 for c in CONNECTIONS}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def new_site(form: Form = Form(), dtype: torch.dtype = torch.float64, **fields: object) -> HyperConnection:
    """A site with random parameters; for n = 1 there is no start of mhc that preserves anything."""
    config = MHCConfig(n_streams=form.n, connection=form.connection, init="paper", **fields)
    site = HyperConnection(WIDTH, config, channel_dim=form.channel_dim, dtype=dtype)
    with torch.no_grad():
        site.phi.copy_(0.3 * gaussian(*site.phi.shape, seed=1))
        site.alpha.copy_(torch.tensor([0.7, -0.4, 1.3]))
        site.bias.copy_(gaussian(*site.bias.shape, seed=2))
    return site


def state(form: Form = Form(), dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, n, C), or (2, n, C, 3, 2)."""
    return gaussian(*LEADING[form.channel_dim], form.n, WIDTH, *BEHIND[form.channel_dim], seed=3, dtype=dtype)


def branch_output(form: Form = Form(), dtype: torch.dtype = torch.float64) -> Tensor:
    """What a block returned: the state's shape without n."""
    return gaussian(*LEADING[form.channel_dim], WIDTH, *BEHIND[form.channel_dim], seed=4, dtype=dtype)


# -- the formulas, one token at a time and written out ---------------------------------------------------------------


def gated_token(site: HyperConnection, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 14 to 18 for one state (n, C), and the logits of H_res."""
    n = len(X)
    x = torch.cat(list(X))
    r = (sum(v * v for v in x) / len(x) + site.config.eps_norm) ** 0.5
    raw = [(x * column).sum() / r for column in site.phi.T]
    a_pre, a_post, a_res = site.alpha
    scale = [a_pre] * n + [a_post] * n + [a_res] * (len(raw) - 2 * n)
    logit = [a * value + b for a, value, b in zip(scale, raw, site.bias, strict=True)]
    pre = torch.stack([1 / (1 + torch.exp(-v)) for v in logit[:n]])
    post = torch.stack([2 / (1 + torch.exp(-v)) for v in logit[n : 2 * n]])
    return pre, post, torch.stack(logit)[2 * n :]


def mhc_token(site: HyperConnection, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 19 too."""
    n = len(X)
    pre, post, logits = gated_token(site, X)
    res = torch.exp(logits).reshape(n, n)
    for _ in range(site.config.sinkhorn_iterations):
        res = torch.stack([column / column.sum() for column in res.T]).T
        res = torch.stack([row / row.sum() for row in res])
    return pre, post, res


def deepseek_v4_token(site: HyperConnection, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' DeepseekV4HyperConnection for one state, with its H_res[in, out] turned round at the end."""
    n, eps = len(X), 1e-6
    x = torch.cat(list(X))
    r = (sum(v * v for v in x) / len(x) + site.config.eps_norm) ** 0.5
    raw = torch.stack([(x * column).sum() / r for column in site.phi.T])
    a_pre, a_post, a_res = site.alpha
    pre = 1 / (1 + torch.exp(-(a_pre * raw[:n] + site.bias[:n]))) + eps
    post = 2 / (1 + torch.exp(-(a_post * raw[n : 2 * n] + site.bias[n : 2 * n])))
    res = torch.exp(a_res * raw[2 * n :] + site.bias[2 * n :]).reshape(n, n)
    res = torch.stack([row / row.sum() for row in res]) + eps
    for iteration in range(site.config.sinkhorn_iterations):
        if iteration:
            res = torch.stack([row / (row.sum() + eps) for row in res])
        res = torch.stack([column / (column.sum() + eps) for column in res.T]).T
    return pre, post, res.T


def hc_token(site: HyperConnection, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic hyper-connections for one state (n, C), from their paper's B (n), A_m (n) and A_r (n, n)."""
    n = len(X)
    w_beta, w_m, w_r = site.phi[:, 0], site.phi[:, 1], site.phi[:, 2:]
    s_m, s_beta, s_r = site.alpha
    A_m, B, A_r = site.bias[:n].clone(), site.bias[n : 2 * n].clone(), site.bias[2 * n :].reshape(n, n).T.clone()
    for i in range(n):
        h = X[i] / ((X[i] * X[i]).sum() / WIDTH + site.config.eps_norm) ** 0.5
        B[i] = B[i] + s_beta * torch.tanh((h * w_beta).sum())
        A_m[i] = A_m[i] + s_m * torch.tanh((h * w_m).sum())
        A_r[i] = A_r[i] + s_r * torch.tanh((h[:, None] * w_r).sum(0))
    return A_m, B, A_r.T  # H' = A_r^T H + B h_o^T


def relative_token(site: HyperConnection, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those that differ from mHC in what they make of the logits of H_res."""
    pre, post, logits = gated_token(site, X)
    return pre, post, connections_by_hand.H_RES[site.config.connection](logits, len(X))


TOKEN = {"mhc": mhc_token, "deepseek_v4": deepseek_v4_token, "hc": hc_token}
TOKEN |= dict.fromkeys(connections_by_hand.H_RES, relative_token)


def tokens(X: Tensor, channel_dim: int, streams: bool) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every token's (n, C), or (C), with its index."""
    last = X if channel_dim == -1 else X.movedim((1, 2) if streams else (1,), (-2, -1) if streams else (-1,))
    shape = last.shape[: -2 if streams else -1]
    for number in range(shape.numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(number), shape))
        yield index, last[index]


def by_token(site: HyperConnection, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """u and X' of all tokens."""
    form = Form(site.config.connection, site.config.n_streams, site.channel_dim)
    reads, writes = [], []
    for (_, x), (_, out) in zip(tokens(X, form.channel_dim, True), tokens(y, form.channel_dim, False), strict=True):
        pre, post, res = TOKEN[form.connection](site, x)
        reads.append(sum(pre[j] * x[j] for j in range(form.n)))
        writes.append([sum(res[i, j] * x[j] for j in range(form.n)) + post[i] * out for i in range(form.n)])
    leading, behind = LEADING[form.channel_dim], BEHIND[form.channel_dim]
    u = torch.stack(reads).reshape(*leading, *behind, WIDTH)
    new = torch.stack([torch.stack(rows) for rows in writes]).reshape(*leading, *behind, form.n, WIDTH)
    if form.channel_dim == 1:
        u, new = u.movedim(-1, 1), new.movedim((-2, -1), (1, 2))
    return u, new


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_formulas(form: Form) -> None:
    site, X, y = new_site(form), state(form), branch_output(form)
    u, mix = site.pre(X)
    with torch.no_grad():
        want_u, want = by_token(site, X, y)
    torch.testing.assert_close(u, want_u, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(site.post(X, y, mix), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", [Form(c, FEW[c], dim) for c in CONNECTIONS for dim in (-1, 1)], ids=str)
def test_gradients(form: Form) -> None:
    site = new_site(form, sinkhorn_iterations=5)
    grads = []
    for explicit in (False, True):
        X, y = state(form).requires_grad_(), branch_output(form).requires_grad_()
        if explicit:
            u, new = by_token(site, X, y)
        else:
            u, mix = site.pre(X)
            new = site.post(X, y, mix)
        loss = (gaussian(*u.shape, seed=5) * u).sum() + (gaussian(*new.shape, seed=6) * new).sum()
        grads.append(torch.autograd.grad(loss, [X, y, *site.parameters()]))
    for mine, want in zip(*grads, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fields", [{"sinkhorn_iterations": 1}, {"sinkhorn_iterations": 3}, {"eps_norm": 0.5}], ids=str)
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_options_reach_the_formulas(connection: str, fields: dict[str, float]) -> None:
    form = Form(connection, FEW[connection])
    site, X, y = new_site(form, **fields), state(form), branch_output(form)
    u, mix = site.pre(X)
    want_u, want = by_token(site, X, y)
    torch.testing.assert_close(u, want_u, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(site.post(X, y, mix), want, rtol=1e-11, atol=1e-12)
    defaults = new_site(form)
    other = defaults.post(X, y, defaults.pre(X)[1])
    takes = "eps_norm" in fields or connection in ("mhc", "deepseek_v4")
    assert ((other - want).abs().max() > 1e-4) == takes


@pytest.mark.parametrize("form", [Form(n=3), Form(n=3, channel_dim=1)], ids=str)
def test_coefficients_are_those_that_pre_and_post_use(form: Form) -> None:
    site, X, y = new_site(form), state(form), branch_output(form)
    h = site.coefficients(X)
    _, mix = site.pre(X)
    for used, shown in zip(mix, (h.post, h.res)):
        torch.testing.assert_close(used, shown, rtol=1e-13, atol=0)
    one_hot = torch.zeros_like(h.res)
    one_hot[..., 0, 2] = 1  # stream 2 goes to stream 0
    got = site.post(X, y, mix._replace(res=one_hot, post=torch.zeros_like(h.post)))
    axis = -2 if form.channel_dim == -1 else 1
    assert torch.equal(got.select(axis, 0), X.select(axis, 2)) and not got.select(axis, 1).any()


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shapes(form: Form) -> None:
    site, X, y = new_site(form), state(form), branch_output(form)
    n = form.n
    columns = 2 * n + connections_by_hand.COLUMNS.get(form.connection, lambda n: n * n)(n)
    assert {name: tuple(p.shape) for name, p in site.named_parameters()} == {
        "phi": (n * WIDTH, columns) if form.connection != "hc" else (WIDTH, n + 2),
        "alpha": (3,),
        "bias": (columns,),
    }
    assert list(site.state_dict()) == ["phi", "alpha", "bias", "_extra_state"] and not list(site.children())
    u, mix = site.pre(X)
    per_token = (*LEADING[form.channel_dim], *BEHIND[form.channel_dim])
    assert u.shape == y.shape and mix.post.shape == (*per_token, n) and mix.res.shape == (*per_token, n, n)
    assert site.post(X, y, mix).shape == X.shape
    h = site.coefficients(X)
    assert h.pre.shape == h.post.shape == (*per_token, n) and h.res.shape == (*per_token, n, n)


@pytest.mark.parametrize("form", [Form(), Form(channel_dim=1), Form("hc"), Form("hc", channel_dim=1)], ids=str)
def test_runs_on_meta(form: Form) -> None:
    site, X, y = new_site(form).to("meta"), state(form).to("meta"), branch_output(form).to("meta")
    u, mix = site.pre(X)
    new = site.post(X, y, mix)
    assert u.is_meta and u.shape == y.shape and new.is_meta and new.shape == X.shape


def test_repr_says_what_it_is() -> None:
    text = repr(HyperConnection(8, MHCConfig(n_streams=3, connection="hc"), index=5))
    assert text == "HyperConnection(hc, n_streams=3, width=8, index=5)"


# -- dtypes ----------------------------------------------------------------------------------------------------------

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("narrow", ["half", "bfloat16", "to(bf16)", "to(f16)"])
@pytest.mark.parametrize("inside", [False, True])
def test_parameters_stay_wide(narrow: str, inside: bool) -> None:
    site = new_site(dtype=F32)
    before = copy.deepcopy(site.state_dict())
    site.pre(state(dtype=F32))[0].sum().backward()
    model = nn.ModuleDict({"site": site, "linear": nn.Linear(2, 2)}) if inside else site
    cast = {
        "half": model.half,
        "bfloat16": model.bfloat16,
        "to(bf16)": lambda: model.to(BF16),
        "to(f16)": lambda: model.to(F16),
    }
    assert cast[narrow]() is model
    for name, p in site.named_parameters():
        assert p.dtype == F32 and torch.equal(p, before[name])
        assert p.grad is None or p.grad.dtype == F32
    if inside:
        assert model["linear"].weight.dtype in (BF16, F16)


@pytest.mark.parametrize("widen", [lambda site: site.double(), lambda site: site.to(F64)], ids=["double", "to(f64)"])
def test_parameters_become_double(widen: object) -> None:
    site = new_site(dtype=F32)
    before = copy.deepcopy(site.state_dict())
    assert widen(site) is site
    assert all(p.dtype == F64 and torch.equal(p, before[name].double()) for name, p in site.named_parameters())
    assert {h.dtype for h in site.coefficients(state())} == {F64}
    site.half()
    assert {p.dtype for p in site.parameters()} == {F64}
    site.float()
    assert all(p.dtype == F32 and torch.equal(p, before[name]) for name, p in site.named_parameters())


def test_device_and_dtype_at_once() -> None:
    site = new_site(dtype=F32).to(device="meta", dtype=BF16)
    assert all(p.is_meta and p.dtype == F32 for p in site.parameters())


def rounded_once(narrow: Tensor, wide: Tensor) -> bool:
    """By half a unit in the last place and no more than a sum of fp32 numbers of size 1 is known to."""
    unit = torch.finfo(narrow.dtype).eps * 2.0 ** wide.abs().double().log2().floor()
    return bool(((narrow.double() - wide.double()).abs() <= 0.5 * unit + 2e-7).all())


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize(
    "streams,branch,parameters,arithmetic,new",
    [
        (F32, F32, F32, F32, F32),
        (F32, BF16, F32, F32, F32),  # autocast and residual_in_fp32: an fp32 trunk and bf16 branches
        (F32, F16, F32, F32, F32),
        (BF16, BF16, F32, F32, BF16),
        (F16, F16, F32, F32, F16),
        (BF16, F32, F32, F32, F32),
        (F16, BF16, F32, F32, F32),
        (F64, F64, F64, F64, F64),
        (F64, F64, F32, F64, F64),
        (F32, F32, F64, F64, F32),
        (F32, F64, F64, F64, F64),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dtypes(
    connection: str, streams: torch.dtype, branch: torch.dtype, parameters: torch.dtype,
    arithmetic: torch.dtype, new: torch.dtype,
) -> None:  # fmt: skip
    form = Form(connection)
    site, X, y = new_site(form, parameters), state(form, streams), branch_output(form, branch)
    u, mix = site.pre(X)
    assert u.dtype == streams and mix.post.dtype == mix.res.dtype == arithmetic
    got = site.post(X, y, mix)
    assert got.dtype == new == torch.result_type(X, y)
    # Rounded once, at the end.
    wide_u, wide_mix = site.pre(X.to(arithmetic))
    assert rounded_once(u, wide_u) and torch.equal(mix.res, wide_mix.res)
    assert rounded_once(got, site.post(X.to(arithmetic), y.to(arithmetic), mix))


@pytest.mark.parametrize("trunk", [F32, BF16])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_autocast_does_not_reach_the_site(connection: str, trunk: torch.dtype) -> None:
    form = Form(connection)
    site, X, y = new_site(form, F32), state(form, trunk), branch_output(form, BF16)
    u, mix = site.pre(X)
    want = site.post(X, y, mix)
    h = site.coefficients(X)
    with torch.autocast("cpu", BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
        got_u, got_mix = site.pre(X)
        got = site.post(X, y, got_mix)
        got_h = site.coefficients(X)
    for mine, other in zip((got_u, *got_mix, got, *got_h), (u, *mix, want, *h), strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    assert {t.dtype for t in got_h} == {F32}
    if connection not in ("hc", "cayley"):
        assert (got_h.res.sum(-1) - 1).abs().max() < 2e-6  # rounded to bf16 it would be 3e-3


# -- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16])
@pytest.mark.parametrize("init", ["equal", "near_identity"])
def test_starts_with_equal_streams(init: str, n: int) -> None:
    # "equal": 0.8 I + 0.2 / n everywhere.
    off_diagonal = math.log(0.2 / n) - math.log(0.8 + 0.2 / n) if init == "equal" else -8.0
    for index in range(n + 2):
        site = HyperConnection(WIDTH, MHCConfig(n_streams=n, init=init), index=index, dtype=F64)
        assert not site.phi.any() and torch.equal(site.alpha, torch.full((3,), 0.01, dtype=F64))
        h = site.coefficients(state(Form(n=n)))
        assert torch.equal(h.post, torch.ones_like(h.post))
        soft = torch.full((n,), 0.1 / (n - 1), dtype=F64)
        soft[index % n] = 0.9
        torch.testing.assert_close(h.pre, soft.expand_as(h.pre), rtol=1e-14, atol=0)
        assert (h.pre.sum(-1) - 1).abs().max() < 1e-15 * n
        for sums in (h.res.sum(-1), h.res.sum(-2)):
            assert (sums - 1).abs().max() < 1e-15 * n
        off = torch.exp(torch.tensor(off_diagonal, dtype=F64))
        near_identity = (torch.eye(n, dtype=F64) * (1 - off) + off) / (1 + (n - 1) * off)
        torch.testing.assert_close(h.res, near_identity.expand_as(h.res), rtol=1e-13, atol=0)


def test_preserve_of_one_stream_is_refused() -> None:
    """A sigmoid does not reach H_pre = 1."""
    with pytest.raises(MHCError, match="n_streams=1"):
        HyperConnection(WIDTH, MHCConfig(n_streams=1))


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_hc_start(n: int, init: str) -> None:
    """Its paper's own start preserves the function too; it is exact, and reaches n = 1."""
    for index in range(n + 2):
        site = HyperConnection(WIDTH, MHCConfig(n_streams=n, connection="hc", init=init), index=index, dtype=F64)
        assert not site.phi.any() and torch.equal(site.alpha, torch.full((3,), 0.01, dtype=F64))
        h = site.coefficients(state(Form(n=n)))
        assert torch.equal(h.pre, torch.eye(n, dtype=F64)[index % n].expand_as(h.pre))
        assert torch.equal(h.post, torch.ones_like(h.post))
        assert torch.equal(h.res, torch.eye(n, dtype=F64).expand_as(h.res))


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("init", ["equal", "near_identity"])
def test_equal_streams_stay_equal(init: str, connection: str, channel_dim: int) -> None:
    """On streams that have parted, the mean moves by y, and u is mostly the stream that the site prefers."""
    form = Form(connection, 4, channel_dim)
    config = MHCConfig(connection=connection, init=init)
    site = HyperConnection(WIDTH, config, index=2, channel_dim=channel_dim, dtype=F64)
    X, y = state(form), branch_output(form)
    axis = -2 if channel_dim == -1 else 1
    equal = X.select(axis, 0).unsqueeze(axis).expand_as(X)
    u, mix = site.pre(equal)
    # DeepSeek-V4's epsilons leave every sum short by as much.
    close = {"rtol": 1e-13, "atol": 1e-14} if connection != "deepseek_v4" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(u, X.select(axis, 0), **close)
    torch.testing.assert_close(site.post(equal, y, mix), equal + y.unsqueeze(axis), **close)
    u, mix = site.pre(X)
    torch.testing.assert_close(site.post(X, y, mix).mean(axis), X.mean(axis) + y, **close)
    others = sum(X.select(axis, j) for j in (0, 1, 3))
    share = 1.0 if connection == "hc" else 0.9
    want = share * X.select(axis, 2) + (1 - share) / 3 * others
    torch.testing.assert_close(u, want, **close)


def test_paper() -> None:
    torch.manual_seed(0)
    site = HyperConnection(512, MHCConfig(init="paper"), dtype=F64)
    assert torch.equal(site.alpha, torch.full((3,), 0.01, dtype=F64)) and not site.bias.any()
    count = site.phi.numel()
    assert abs(float(site.phi.detach().mean())) < 4 * 0.02 / count**0.5
    assert abs(float(site.phi.detach().std()) / 0.02 - 1) < 4 / (2 * count) ** 0.5
    h = site.coefficients(gaussian(50, 4, 512))
    # What the warning says: H_res almost uniform, and sum(H_pre) = n / 2.
    assert (h.res - 0.25).abs().max() < 0.02 and torch.linalg.svdvals(h.res)[:, 1].max() < 0.02
    assert (h.pre.sum(-1) - 2).abs().max() < 0.05


@pytest.mark.parametrize("init", ["preserve", "equal", "paper"])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_reset_parameters_after_meta(connection: str, init: str) -> None:
    config = MHCConfig(n_streams=FEW[connection], connection=connection, init=init)
    torch.manual_seed(0)
    fresh = HyperConnection(WIDTH, config, index=4)
    site = HyperConnection(WIDTH, config, index=4, device="meta")
    assert all(p.is_meta for p in site.parameters())
    site.to_empty(device="cpu")
    with torch.no_grad():
        for p in site.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(0)
    site.reset_parameters()
    for name, p in fresh.named_parameters():
        assert torch.equal(site.get_parameter(name), p) and site.get_parameter(name).requires_grad


def test_copies() -> None:
    site, X = new_site(Form("mhc", 3)), state(Form("mhc", 3))
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert (other.width, other.config, other.index, other.channel_dim) == (WIDTH, site.config, 0, -1)
        assert torch.equal(other.pre(X)[0], site.pre(X)[0])
    empty = HyperConnection(WIDTH, site.config, dtype=F64)
    empty.load_state_dict(site.state_dict(), strict=True)
    assert torch.equal(empty.pre(X)[0], site.pre(X)[0])
