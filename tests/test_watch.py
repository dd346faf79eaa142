"""Watching a run: each figure by its definition, on models whose answer is known."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, PreNorm, Stack, features
from mhc_rewrite import HyperConnection, mhcify, watch
from mhc_rewrite.errors import ConfigError, MHCError
from mhc_rewrite.insight.watching.measures import of_post, of_pre, of_res, of_states, products, state_products
from watched_models import loss_of

LAYERS, N = 2, 4


def model(connection: str = "mhc", layers: int = LAYERS, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    stack = Stack([PreNorm() for _ in range(layers)]).double()
    return mhcify(stack, (features(2, 5, WIDTH),), n_streams=N, connection=connection, **options)


def sites(converted: nn.Module) -> list[HyperConnection]:
    return [module for module in converted.modules() if isinstance(module, HyperConnection)]


def watched(converted: nn.Module, x: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """The sample of one step; of all tokens."""
    x = features(3, 5, WIDTH) if x is None else x
    with watch(converted, tokens=1000, **options) as seen:
        loss = loss_of(converted(x))
        loss.backward()
        seen.step(loss)
    assert seen.line is not None
    return seen.line


def figures(converted: nn.Module, x: Tensor | None = None, **options: Any) -> dict[str, list[Any]]:
    return watched(converted, x, **options)["figures"]


@torch.no_grad()
def set_res(converted: nn.Module, matrix: Tensor) -> None:
    """hc takes any H_res: alike for all tokens."""
    for site in sites(converted):
        site.phi.zero_()
        site.bias[2 * N :] = matrix.flatten()


close = pytest.approx


# -- models made to have a known answer --------------------------------------------------------------------------------


def test_a_permutation() -> None:
    converted = model("hc")
    P = torch.eye(N, dtype=torch.float64).roll(1, 0)
    set_res(converted, P)
    line = watched(converted)
    found = line["figures"]
    count = 2 * LAYERS
    assert found["row_error"] == found["column_error"] == [0.0] * count
    assert found["from_identity"] == close([math.sqrt(2 * N)] * count, rel=1e-2)
    assert found["from_uniform"] == close([math.sqrt(N - 1)] * count, rel=1e-2)
    assert found["second_singular"] == found["forward_gain"] == found["backward_gain_99"] == [1.0] * count
    assert found["composite_forward"] == found["composite_backward"] == [1.0] * count
    assert line["maps"]["res"] == [P.flatten().tolist()] * count
    whole = torch.linalg.matrix_power(P, count)  # the identity
    assert line["composite"] == [{"map": whole.flatten().tolist(), "shape": [N, N]}]


def test_a_gain_that_doubles_at_every_site() -> None:
    converted = model("hc", layers=3)
    set_res(converted, 2 * torch.eye(N, dtype=torch.float64))
    found = figures(converted)
    assert found["row_error"] == [1.0] * 6
    assert found["forward_gain"] == found["backward_gain"] == [2.0] * 6
    assert found["composite_forward"] == found["composite_forward_99"] == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    assert found["composite_backward"] == found["composite_backward_99"] == [64.0, 32.0, 16.0, 8.0, 4.0, 2.0]


def test_row_and_column_sums_are_told_apart() -> None:
    converted = model("hc", layers=1)
    matrix = torch.zeros(N, N, dtype=torch.float64)
    matrix[0] = 1.0  # stream 0 gets all of them, the others nothing
    set_res(converted, matrix)
    found = figures(converted)
    assert found["forward_gain"] == found["composite_forward"] == [4.0, 4.0]  # whose square it is times one
    assert found["backward_gain"] == found["composite_backward"] == [1.0, 1.0]
    assert (found["row_error"], found["column_error"]) == ([3.0, 3.0], [0.0, 0.0])


@torch.no_grad()
def test_equal_streams() -> None:
    converted = model()
    for site in sites(converted):
        site.phi.zero_()
        site.bias[: 2 * N] = 0.0  # H_pre = 1/2 and H_post = 1
    with torch.enable_grad():
        found = figures(converted)
    assert max(found["spread"]) < 1e-12 and found["dominant"] == [1 / N] * 4
    assert found["rank"] == close([1.0] * 4, abs=1e-2)
    assert found["pre_entropy"] == [1.0] * 4 and found["post_spread"] == [0.0] * 4


@torch.no_grad()
def test_one_stream_that_all_read_and_write() -> None:
    converted = model("hc")
    set_res(converted, torch.eye(N, dtype=torch.float64))
    for site in sites(converted):
        site.bias[:N] = torch.tensor([0.0, 0.0, 5.0, 0.0])
        site.bias[N : 2 * N] = torch.tensor([0.0, 0.0, 2.0, 0.0])
    with torch.enable_grad():
        line = watched(converted)
    found = line["figures"]
    assert found["pre_entropy"] == [0.0] * 4 and found["post_spread"] == close([math.sqrt(3) / 2] * 4, rel=1e-2)
    assert found["pre_argmax"] == [2] * 4 and found["pre_argmax_share"] == [1.0] * 4
    assert line["maps"]["pre"] == [[0.0, 0.0, 5.0, 0.0]] * 4 and line["maps"]["post"] == [[0.0, 0.0, 2.0, 0.0]] * 4


def test_dead_mappings() -> None:
    converted = model()
    line = watched(converted)
    assert line["dead"]["res"][0] == 0, "H_res of equal streams moves nothing"
    for site in sites(converted):
        oracle_state = {name: p.grad for name, p in site.named_parameters()}
        assert all(gradient is not None for gradient in oracle_state.values())
    dead = {name: set(numbers) for name, numbers in line["dead"].items()}
    for number, site in enumerate(sites(converted)):
        for k, (name, part) in enumerate(zip(("pre", "post", "res"), site.bias.grad.split([N, N, N * N]))):  # type: ignore[union-attr]
            columns = site.phi.grad.split([N, N, N * N], dim=1)[k]
            largest = max(part.abs().max(), columns.abs().max(), site.alpha.grad[k].abs())
            assert (number in dead[name]) == bool(largest < 1e-8), (number, name)
    assert watched(model(learn=("pre", "post")))["dead"]["res"] == [], "what is not to learn is not dead"


def test_no_gradients_are_no_dead_mappings() -> None:
    converted = model()
    with watch(converted) as seen:
        loss_of(converted(features(3, 5, WIDTH))).backward()
        converted.zero_grad()
        seen.step()
    assert seen.line is not None and not any(seen.line["dead"].values())
    assert seen.line["notes"] == ["no parameter of a site has a gradient: step belongs between backward and zero_grad"]
    for site in sites(converted):
        site.requires_grad_(False)
    line = watched(converted)
    assert "notes" not in line and not any(line["dead"].values()), "frozen ones have none to have"


def test_the_optimizers_epsilon_decides() -> None:
    converted = model()
    wide = torch.optim.Adam(converted.parameters(), eps=1e3)
    assert watched(converted, optimizer=wide)["dead"] == {name: [0, 1, 2, 3] for name in ("pre", "post", "res")}


# -- every figure by its definition, on coefficients that differ from token to token ----------------------------------


@pytest.mark.parametrize("connection", ["mhc", "hc", "cayley"])
def test_figures_of_a_model_in_training(connection: str) -> None:
    converted = model(connection)
    oracle.perturb(converted)
    x = features(3, 5, WIDTH).requires_grad_()
    reads, gradients, after = by_hand(converted, x)
    converted.zero_grad()
    line = watched(converted, x)
    found = line["figures"]
    running = torch.eye(N, dtype=torch.float64)
    res = [c.res.reshape(-1, N, N) for c in reads]
    for k, site in enumerate(sites(converted)):
        pre, post, H = reads[k].pre.reshape(-1, N), reads[k].post.reshape(-1, N), res[k]
        running = H @ running
        back = functools.reduce(lambda before, after: after @ before, res[k:])
        X = after[k].reshape(-1, N, WIDTH)
        mean = X.mean(1, keepdim=True)
        share = pre.abs() / pre.abs().sum(-1, keepdim=True)
        singular = torch.linalg.svdvals(X)
        part = singular / singular.sum(-1, keepdim=True)
        expected = {
            "row_error": (H.sum(2) - 1).abs().max(1).values.median(),
            "column_error": (H.sum(1) - 1).abs().max(1).values.quantile(0.5),
            "from_identity": torch.stack([(h - torch.eye(N)).norm() for h in H]).mean(),
            "from_uniform": torch.stack([(h - 1 / N).norm() for h in H]).mean(),
            "second_singular": torch.linalg.svdvals(H)[:, 1].mean(),
            "forward_gain": H.abs().sum(2).max(1).values.quantile(0.5),
            "forward_gain_99": H.abs().sum(2).max(1).values.quantile(0.99),
            "backward_gain": H.abs().sum(1).max(1).values.quantile(0.5),
            "composite_forward": running.abs().sum(2).max(1).values.quantile(0.5),
            "composite_backward": back.abs().sum(1).max(1).values.quantile(0.5),
            "pre_entropy": -(share * share.log()).sum(1).mean() / math.log(N),
            "pre_argmax": pre.abs().argmax(1).mode().values,
            "post_spread": post.std(1, correction=0).mean(),
            "spread": ((X - mean).square().mean() / mean.square().mean()).sqrt(),
            "dominant": (X.square().sum(2).max(1).values / X.square().sum((1, 2))).mean(),
            "rank": (-(part * part.log()).sum(1)).exp().mean(),
            "trunk_gradient": gradients[k].sum(-2).norm(),
            "state_gradient": gradients[k].norm(),
        }
        for name, value in expected.items():
            if found[name][k] is None:
                assert (name, k) == ("state_gradient", 0), "the streams at the entry are one tensor"
            else:
                assert found[name][k] == close(float(value), rel=6e-3, abs=1e-12), (name, k)
        for mapping, columns in zip(("pre", "post", "res"), site.bias.grad.split([N, N, len(site.bias) - 2 * N])):  # type: ignore[union-attr]
            assert found[f"bias_{mapping}_gradient"][k] == close(float(columns.norm()), rel=6e-3)
        assert line["maps"]["res"][k] == close(H.mean(0).flatten().tolist(), rel=6e-3, abs=1e-9)
    assert line["composite"][0]["map"] == close(running.mean(0).flatten().tolist(), rel=6e-3, abs=1e-9)


def by_hand(converted: nn.Module, x: Tensor) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """Of each site its coefficients, the gradient of the state that it reads, and the state behind it: by a run of the
    model's parts in the test's own order."""
    X = x.detach().unsqueeze(-2).expand(3, 5, N, WIDTH).clone().requires_grad_()
    reads, states, after = [], [], []
    for layer in converted.layers:  # type: ignore[union-attr]
        for site, block in ((layer.mhc_0, lambda u, m=layer: m.attn(m.norm1(u))), (layer.mhc_1, lambda u, m=layer: m.mlp(m.norm2(u)))):  # noqa: E501  # fmt: skip
            X.retain_grad()
            states.append(X)
            c = site.coefficients(X)
            y = block((c.pre.unsqueeze(-1) * X).sum(-2))
            X = torch.einsum("btij,btjc->btic", c.res, X) + c.post.unsqueeze(-1) * y.unsqueeze(-2)
            reads.append(type(c)(*(h.detach() for h in c)))
            after.append(X.detach())
    loss_of(converted.norm(X.mean(-2))).backward()  # type: ignore[operator]
    return reads, [state.grad for state in states], after  # type: ignore[misc]


def test_products_where_the_number_of_streams_changes() -> None:
    a, b = torch.rand(7, 4, 4, dtype=torch.float64), torch.rand(7, 2, 2, dtype=torch.float64)
    average = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    forward, backward = products([a, b])
    assert torch.allclose(forward[1], b @ average @ a) and torch.allclose(backward[0], b @ average @ a)
    assert torch.equal(forward[0], a) and torch.allclose(backward[1], b)


def test_what_is_not_finite_raises_nothing() -> None:
    res = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    res[1, 0, 0] = math.inf
    assert of_res(res)["second_singular"].tolist() == close([1.0, math.nan], nan_ok=True)
    state = torch.ones(2, 3, 5, dtype=torch.float64)
    state[0, 0, 0] = math.nan
    assert of_states(state_products(state))["rank"].tolist() == close([math.nan, 1.0], nan_ok=True, abs=1e-6)
    assert of_pre(torch.zeros(1, 3))["pre_entropy"].isnan().all() and of_post(torch.ones(1, 3))["post_spread"] == 0


# -- nothing is changed ------------------------------------------------------------------------------------------------


def trained(converted: nn.Module, step: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(converted.parameters(), 1e-2)
    for _ in range(5):
        loss = converted(torch.randn(3, 5, WIDTH)).square().mean()
        loss.backward()
        step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return converted.state_dict()


@pytest.mark.parametrize("options", [{}, {"recompute": 2}], ids=str)
def test_training_is_the_same_to_the_last_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = mhcify(Stack([PreNorm(dropout=0.2) for _ in range(2)]), (torch.randn(2, 5, WIDTH),), **options).train()
    seen_one = copy.deepcopy(plain)
    expected = trained(plain, lambda loss: None)
    with watch(seen_one, every=2) as seen:
        found = trained(seen_one, seen.step)
    assert seen.line is not None and seen.line["step"] == 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_no_hooks_in_other_steps_and_none_behind() -> None:
    converted = model()

    def hooked() -> int:
        own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in converted.modules())
        return own + sum(name in site.__dict__ for site in sites(converted) for name in ("post", "post_collapse"))

    assert hooked() == 0
    with pytest.raises(ZeroDivisionError), watch(converted, every=2) as seen:
        assert hooked() == 2, "the model's own, until it is called"
        converted(features(2, 5, WIDTH)).sum().backward()
        assert hooked() == 2 + 2 * 2 * LAYERS
        seen.step()
        assert hooked() == 0
        converted(features(2, 5, WIDTH)).sum().backward()
        seen.step()
        assert hooked() == 2
        raise ZeroDivisionError
    assert hooked() == 0


def test_a_copy_takes_no_hooks_along() -> None:
    converted = model()
    with watch(converted) as seen:
        other = copy.deepcopy(converted)
        other(features(2, 5, WIDTH)).sum().backward()
        with pytest.warns(UserWarning, match="no forward with gradients was seen in step 0"):
            seen.step()
    assert seen.line is None


def test_evaluation_is_not_seen() -> None:
    converted = model()
    oracle.perturb(converted)
    x = features(3, 5, WIDTH)
    expected = watched(converted, x)
    converted.zero_grad()
    with watch(converted, tokens=1000) as seen:
        with torch.no_grad():
            converted(features(7, 5, WIDTH))
        loss = loss_of(converted(x))
        with torch.no_grad():
            converted(features(7, 5, WIDTH))
        loss.backward()
        seen.step(loss)
    assert seen.line == expected


# -- what can't be watched ---------------------------------------------------------------------------------------------


def test_mistakes_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="Stack is not converted"):
        watch(Stack([PreNorm()]))
    with pytest.raises(ConfigError, match="every must be an int of at least 1, not 0"):
        watch(model(), every=0)
    with pytest.raises(ConfigError, match="attach takes a Trainer of transformers or of Lightning, not dict"):
        watch(model()).attach({})
    with watch(model()) as seen:
        with pytest.warns(UserWarning, match="call step once for every optimizer step"):
            seen.step()
