"""A connection from outside the package; connections without a projection; mappings that do not learn."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import pages
from mhc_rewrite import MHCConfig, gates, mhcify, portable, register_connection
from mhc_rewrite.config import MAPPINGS
from mhc_rewrite.connections import CONNECTIONS, STARTS
from mhc_rewrite.cost import cost
from mhc_rewrite.errors import ConfigError, KernelError, MHCError, SitesError
from mhc_rewrite.kernels import composed, ops, reference
from mhc_rewrite.kernels.kinds import FUNCTIONS, static
from mhc_rewrite.sites import options
from mhc_rewrite.sites.hyper_connection import HyperConnection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorials" / "your_own_connection.md"
C, F64 = 16, torch.float64


@pytest.fixture(scope="module", autouse=True)
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's file, imported from where a user has it."""
    (block,) = (block for block in pages.blocks(PAGE) if block.title == "leaky.py")
    file = tmp_path_factory.mktemp("outside") / "leaky.py"
    file.write_text(block.text)
    spec = importlib.util.spec_from_file_location("leaky", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["leaky"] = module
    spec.loader.exec_module(module)
    yield module
    del CONNECTIONS["leaky"], FUNCTIONS["leaky"], sys.modules["leaky"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.dropout = nn.LayerNorm(C), nn.Linear(C, C), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.tanh(self.mlp(self.norm(x))))
        return y


def model_and_input(dtype: torch.dtype = F64) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4))).to(dtype).eval(), torch.randn(2, 5, C, dtype=dtype)


def by_hand(model: nn.Sequential, state: dict[str, Tensor], x: Tensor, n: int) -> Tensor:
    """Token by token as the page says it, and nothing of the package."""
    X = torch.stack([x] * n, dim=-2)
    for number, block in enumerate(model):
        phi, alpha, bias = (state[f"{number}.mhc_0.{field}"] for field in ("phi", "alpha", "bias"))
        flat = X.flatten(-2)
        s = flat @ phi / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        pre = torch.sigmoid(alpha[0] * s[..., :n] + bias[:n])
        post = 2 * torch.sigmoid(alpha[1] * s[..., n : 2 * n] + bias[n : 2 * n])
        share = torch.sigmoid(alpha[2] * s[..., 2 * n :] + bias[2 * n :]).unsqueeze(-1)
        y = block.branch((pre.unsqueeze(-1) * X).sum(-2))
        X = (1 - share) * X + share * X.mean(-2, keepdim=True) + post.unsqueeze(-1) * y.unsqueeze(-2)
    return X.mean(-2)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gradients(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": y.detach(), "x": x.grad, **found}  # type: ignore[dict-item]


def same(got: dict[str, Tensor], want: dict[str, Tensor], close: float) -> None:
    assert got.keys() == want.keys()
    largest = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= close * max(float(value.norm()), 1e-6 * largest), name


# -- one from outside --------------------------------------------------------------------------------------------------


def test_it_is_a_page() -> None:
    (block,) = (block for block in pages.blocks(PAGE) if block.title == "leaky.py")
    assert len(block.text.splitlines()) < 30


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("training", [False, True])
def test_against_a_model_by_hand(n: int, training: bool) -> None:
    model, x = model_and_input()
    original = copy.deepcopy(model)
    mhcify(model, (x,), connection="leaky", n_streams=n)
    assert relative(model(x), original(x)) < 1e-14
    oracle.perturb(model)
    state = dict(model.named_parameters())
    model.train(training)
    got = gradients(model, model, x)
    want = gradients(model, lambda x: by_hand(model, state, x, n), x)
    assert relative(got[""], original(x)) > 1e-2
    same(got, want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["leaky", static("leaky"), static("mhc"), static("deepseek_v4"), static("hc")])
@pytest.mark.parametrize("given", [1, 4])
def test_operators(kind: str, given: int, dtype: torch.dtype) -> None:
    """Those that run for the dtype, against the reference in fp64, with gradients of all operands."""
    n, T = 4, 11
    torch.manual_seed(0)
    columns = 2 * n + (1 if "leaky" in kind else n * n)
    drawn = columns if kind == "leaky" else 0
    X, y = torch.randn(T, given, C).to(dtype), torch.randn(T, C).to(dtype)
    h_post, h_res = 2 * torch.rand(T, n), torch.randn(T, n, n).softmax(-1)
    site = 0.2 * torch.randn(n * C, drawn), torch.tensor([0.7, -0.4, 1.3]), torch.randn(columns)
    made: list[list[Tensor]] = []
    for code, wide in ((ops, False), (reference, True)):
        leaves = [t.to(F64) if wide else t.clone() for t in (X, y, h_post, h_res, *site)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        X_, y_, post_, res_, *site_ = leaves
        outputs = [
            *code.pre(X_, *site_, kind, 20, 1e-6)[:3],
            *code.boundary(X_, y_, post_, res_, *site_, kind, 20, 1e-6)[:4],
        ]
        torch.manual_seed(1)
        sum((out.to(F64) * torch.randn(out.shape, dtype=F64)).sum() for out in outputs).backward()
        found = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        made.append([t.detach().to(F64) for t in (*outputs, *found)])
    close = 2e-5 if dtype == torch.float32 else 2e-2
    largest = max(float(want.norm()) for want in made[1])
    for got, want in zip(*made):
        assert got.shape == want.shape
        assert float((got - want).norm()) <= close * max(float(want.norm()), 1e-3 * largest)


@pytest.mark.parametrize("kind", ["leaky", static("leaky"), static("mhc")])
def test_operators_are_what_torch_expects(kind: str) -> None:
    n = 3
    columns = 2 * n + (1 if "leaky" in kind else n * n)
    phi = torch.randn(n * C, 0 if kind.startswith("static") else columns, requires_grad=True)
    X = torch.randn(2, 4, n, C, requires_grad=True)
    operands = X, phi, torch.rand(3, requires_grad=True), torch.randn(columns, requires_grad=True)
    torch.library.opcheck(
        ops.pre_operator, (*operands, 20, kind, 1e-6, ""), test_utils=("test_schema", "test_faketensor")
    )


def test_wrong_operands_are_named() -> None:
    X, alpha = torch.randn(2, 3, C), torch.rand(3)
    with pytest.raises(KernelError, match=r"no number of streams has in 'leaky'"):
        ops.pre(X, torch.randn(3 * C, 8), alpha, torch.randn(8), "leaky", 20, 1e-6)
    with pytest.raises(KernelError, match=r"kind must be one of 'mhc'.*'leaky'"):
        ops.pre(X, torch.randn(3 * C, 7), alpha, torch.randn(7), "laeky", 20, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"connection": "leaky"}, {"dynamic": False}], ids=["function", "static"])
def test_compiled_and_recomputed(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, x = model_and_input(torch.float32)
    mhcify(model, (x,), **options)
    oracle.perturb(model)
    want = gradients(model, model, x)
    for recompute in (2, None) if options.get("dynamic", True) else (2,):
        torch._dynamo.reset()
        with caplog.at_level("DEBUG", "mhc_rewrite.passes"):
            compiled = torch.compile(model, backend="mhc", options={"recompute": recompute})
            same(gradients(model, compiled, x), want, 2e-4)
    assert "3 boundaries fused, 0 left" in caplog.text and "segments of [[2, 2]] sites" in caplog.text
    torch._dynamo.reset()
    other, _ = model_and_input(torch.float32)
    mhcify(other, (x,), recompute=2, **options)
    other.load_state_dict(model.state_dict())
    same(gradients(other, other, x), want, 1e-5)


def test_the_plain_form_is_the_same() -> None:
    model, x = model_and_input()
    mhcify(model, (x,), connection="leaky")
    oracle.perturb(model)
    want = gradients(model, model, x)
    with portable():
        same(gradients(model, model, x), want, 1e-12)
    parameters = dict(model.named_parameters())
    by_transform = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in parameters.items():
        assert p.grad is not None and relative(by_transform[name], p.grad) < 1e-11, name


def test_what_compiled_graphs_are_named_by(leaky: ModuleType) -> None:
    """What a function computes is part of the key of caches, wherever what it calls is written."""
    share, table = [1.0], torch.tensor([0.5])

    def function(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, res = leaky.leaky(raw, alpha, bias, n)
        return pre, post, share[0] * res + table.to(res) * 0.0

    def name(function: Any) -> str:
        register_connection("named", dataclasses.replace(CONNECTIONS["leaky"], function=function))
        try:
            return composed.name_of_function("named", 9)
        finally:
            del CONNECTIONS["named"], FUNCTIONS["named"]

    names = [name(function), composed.name_of_function("leaky", 9), composed.name_of_function("leaky", 7)]
    share[0] = 2.0  # where no source says it
    names.append(name(lambda *given: function(*given)))
    table = torch.tensor([0.25])
    names.append(name(lambda *given: function(*given)))
    assert len(set(names)) == 5 and composed.name_of_function("mhc", 24) == ""
    assert names[1] == name(lambda *given: leaky.leaky(*given))  # the same by another name


def misshapen(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, ...]:
    return gates(raw, alpha, bias, n)


def two(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, ...]:
    return gates(raw, alpha, bias, n)[:2]


def branching(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, ...]:
    pre, post, res = CONNECTIONS["leaky"].function(raw, alpha, bias, n)  # type: ignore[misc]
    return pre, post, res if raw.max() < 100.0 else 2 * res


@pytest.mark.parametrize(
    "function,said",
    [
        (misshapen, r"returned \[\(4,\), \(4,\), \(1,\)\]"),
        (two, r"returned \[\(4,\), \(4,\)\]"),
        (branching, "can't be traced .* must not look at values: write torch.where"),
    ],
)
def test_wrong_functions_are_named(function: Any, said: str) -> None:
    """And the model is as it was."""
    register_connection("wrong", dataclasses.replace(CONNECTIONS["leaky"], function=function))
    model, x = model_and_input()
    want = model(x)
    try:
        with pytest.raises(MHCError, match=rf"(?s){function.__name__} \(.*test_connections\.py:\d+\).*{said}"):
            mhcify(model, (x,), connection="wrong")
    finally:
        del CONNECTIONS["wrong"], FUNCTIONS["wrong"]
    assert torch.equal(model(x), want) and not list(oracle.site_parameters(model))


def test_a_connection_that_is_not_there_yet() -> None:
    """In a process that has a model and has not imported its connection."""
    model, x = model_and_input()
    mhcify(model, (x,), connection="leaky")
    kept = CONNECTIONS.pop("leaky")
    try:
        with pytest.raises(ConfigError, match=r"no connection 'leaky'.*import the file that does it"):
            model(x)
    finally:
        CONNECTIONS["leaky"] = kept


def test_cost() -> None:
    model, x = model_and_input()
    mhcify(model, (x,), connection="leaky")
    from mhc_rewrite import report

    made = cost(report(model).plan)
    sites = sum(p.numel() for _, p in oracle.site_parameters(model))
    assert made.evaluate(made.parameters) == sites
    for way, expected in zip(made.traffic["boundary"], (14, 4 * 4 + 5), strict=True):
        assert made.evaluate((way.read + way.written) / C) == expected * made.streams[0].width / C


def test_the_registry_refuses() -> None:
    leaky = CONNECTIONS["leaky"]
    register_connection("leaky", leaky)  # once more, as when a file is imported again
    with pytest.raises(ConfigError, match="There is a connection 'leaky' already"):
        register_connection("leaky", dataclasses.replace(leaky, source="elsewhere"))
    with pytest.raises(ConfigError, match="'late' has no start 'equal'"):
        register_connection("late", dataclasses.replace(leaky, starts={"preserve": leaky.starts["preserve"]}))
    with pytest.raises(ConfigError, match="'none' has no function"):
        register_connection("none", dataclasses.replace(leaky, function=None))
    assert {"late", "none"}.isdisjoint(CONNECTIONS)
    odd = dataclasses.replace(leaky, refuses=lambda n: "an odd number is needed: 3" if n % 2 == 0 else "")
    register_connection("odd", odd)
    try:
        assert MHCConfig(connection="odd", n_streams=3).connection == "odd"
        with pytest.raises(ConfigError, match="connection='odd' with n_streams=4: an odd number is needed: 3"):
            MHCConfig(connection="odd")
    finally:
        del CONNECTIONS["odd"], FUNCTIONS["odd"]


# -- without a projection ----------------------------------------------------------------------------------------------


def connections() -> list[str]:
    return [*CONNECTIONS, "leaky"]


@pytest.mark.parametrize("connection", connections())
def test_without_a_projection(connection: str) -> None:
    """What a dynamic site computes whose phi is zero; bias is all there is, and learns."""
    for n in (2, 4):
        config = MHCConfig(n_streams=n, connection=connection)
        dynamic = HyperConnection(C, config, index=1, dtype=F64)
        still = HyperConnection(C, dataclasses.replace(config, dynamic=False), index=1, dtype=F64)
        assert [name for name, _ in still.named_parameters()] == ["bias"] and still.phi is None
        assert torch.equal(still.bias, dynamic.bias)
        with torch.no_grad():
            for site in (dynamic, still):
                site.bias.add_(torch.linspace(-0.5, 0.5, len(site.bias), dtype=F64))
            dynamic.phi.zero_()
        X, y = torch.randn(3, n, C, dtype=F64), torch.randn(3, C, dtype=F64)
        results = []
        for site in (dynamic, still):
            u, mix = site.pre(X)
            new, read, after = site.boundary(site.post(X, y + u, mix), y, mix)
            torch.manual_seed(1)
            sum((t * torch.randn_like(t)).sum() for t in (new, read, *after)).backward()
            results.append((new, read, *after, site.bias.grad, *site.coefficients(X)))
        for mine, want in zip(*results):
            assert relative(mine, want) < 1e-12


@pytest.mark.parametrize("init", [init for init in STARTS if init != "paper"])
def test_starts_without_a_projection(init: str) -> None:
    model, x = model_and_input()
    want = model(x)
    mhcify(model, (x,), dynamic=False, init=init)
    assert relative(model(x), want) < 1e-12


def test_weights_without_a_projection_are_told_apart() -> None:
    model, x = model_and_input()
    mhcify(model, (x,), dynamic=False)
    other, _ = model_and_input()
    mhcify(other, (x,))
    with pytest.raises(SitesError, match=r"of a site with dynamic=False, and .* has dynamic=True"):
        other.load_state_dict(model.state_dict())
    again, _ = model_and_input()
    mhcify(again, (x,), dynamic=False)
    oracle.perturb(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_options_of_an_earlier_version() -> None:
    """Weights that say nothing of an option were made where it was not there."""
    site = HyperConnection(C)
    older = site.options()
    del older["dynamic"]
    site.set_extra_state(options.to_tensor(older, torch.device("cpu")))
    still = HyperConnection(C, MHCConfig(dynamic=False))
    with pytest.raises(SitesError, match="dynamic=True"):
        still.set_extra_state(options.to_tensor(older, torch.device("cpu")))


# -- what does not learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connection", connections())
@pytest.mark.parametrize("learn", [("pre", "post"), ("res",), ("post",)])
def test_mappings_that_do_not_learn(connection: str, learn: tuple[str, ...]) -> None:
    model, x = model_and_input()
    whole = copy.deepcopy(model)
    for m, which in ((model, learn), (whole, MAPPINGS)):
        mhcify(m, (x,), connection=connection, learn=which)
        oracle.perturb(m, strength=0.3)
    mine, every = gradients(model, model, x), gradients(whole, whole, x)
    assert torch.equal(mine[""], every[""])
    n = 4
    for name, gradient in every.items():
        if not name.endswith(("phi", "alpha", "bias")) or "mhc_" not in name:
            assert relative(mine[name], gradient) < 1e-12
            continue
        if connection == "hc" and name.endswith("phi"):
            parts = {"post": gradient[:, :1], "pre": gradient[:, 1:2], "res": gradient[:, 2:]}
            got = {"post": mine[name][:, :1], "pre": mine[name][:, 1:2], "res": mine[name][:, 2:]}
        else:
            columns = gradient.shape[-1]
            sizes = [1, 1, 1] if name.endswith("alpha") else [n, n, columns - 2 * n]
            parts, got = (dict(zip(MAPPINGS, g.split(sizes, -1))) for g in (gradient, mine[name]))
        for mapping in MAPPINGS:
            if mapping in learn:
                assert torch.equal(got[mapping], parts[mapping]), (name, mapping)
            else:
                assert not got[mapping].any(), (name, mapping)


@pytest.mark.parametrize("learn", [(), ("mix",), ("pre", "mix"), 3, "out"])
def test_learn_is_checked(learn: Any) -> None:
    with pytest.raises(ConfigError, match="learn takes one or more of 'pre', 'post', 'res'"):
        MHCConfig(learn=learn)


def test_options_are_in_one_order() -> None:
    assert MHCConfig(learn=("res", "pre")) == MHCConfig(learn=("pre", "res", "pre"))
    assert MHCConfig(learn="post").learn == ("post",)
    config = MHCConfig(learn="post", dynamic=False)
    assert MHCConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="dynamic must be True or False"):
        MHCConfig(dynamic=1)  # type: ignore[arg-type]
