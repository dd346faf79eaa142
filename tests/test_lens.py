"""Models without a stream, a site or mixing, and what streams predict: against models written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, PreNorm, Stack, features, prenorm_by_hand, tokens
from handmade.layers import GPT, gpt_by_hand
from handmade.vision import ResNet
from mhc_rewrite import HyperConnection, ablate, mhcify, stream_lens
from mhc_rewrite.errors import ConfigError, MHCError
from mhc_rewrite.insight.ablation import eager
from oracle import Streams

N = 4
IDS = tokens(2, 6)


def gpt(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The ordinary model, and the converted one with its sites perturbed."""
    torch.manual_seed(0)
    original = GPT(layers=3).double().eval()
    converted = mhcify(copy.deepcopy(original), (IDS,), n_streams=N, **options)
    oracle.perturb(converted)
    return original, converted


class Changed(Streams):
    """The steps of an n-stream model, with a change of what a site reads and of what it makes, where `at` says so.

    Args:
        before: of the state that a site reads, and behind it of the one that it leaves.
        coefficients: of H_post and H_res.
    """

    def __init__(
        self,
        converted: nn.Module,
        at: Callable[[str], bool],
        state: Callable[[Tensor], Tensor] = lambda X: X,
        coefficients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda post, res: (post, res),
        connection: str = "mhc",
    ) -> None:
        super().__init__(converted.state_dict(), N, connection=connection)
        self.at, self.change, self.coefficients = at, state, coefficients

    def site(self, name: str, X: Tensor, branch: Callable[[Tensor], Tensor], trunk: Any = None) -> Tensor:
        change, of_coefficients = self.change, self.coefficients
        if not self.at(name):
            change, of_coefficients = (lambda X: X), (lambda post, res: (post, res))
        X = change(X)
        u, post, res = oracle.site(self.params(name), X, -1, self.connection)
        post, res = of_coefficients(post, res)
        return change(oracle.apply(X, branch(u), post, res, -1))


def others(stream: int) -> Callable[[Tensor], Tensor]:
    """The mean of the other streams in the place of one."""

    def change(X: Tensor) -> Tensor:
        parts = list(X.unbind(-2))
        parts[stream] = sum(part for k, part in enumerate(parts) if k != stream) / (N - 1)
        return torch.stack(parts, -2)

    return change


def identity(post: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
    return post, torch.eye(N, dtype=res.dtype).expand(res.shape)


def nothing(post: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(post), identity(post, res)[1]


def everywhere(name: str) -> bool:
    return True


def in_layer_1(name: str) -> bool:
    return name.startswith("layers.1.")


CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Changed]]] = {
    "a stream": ({"stream": 2}, lambda m: Changed(m, everywhere, others(2))),
    "a stream of a layer": ({"stream": 0, "sites": "layers.1"}, lambda m: Changed(m, in_layer_1, others(0))),
    "no mixing": ({"mixing": False}, lambda m: Changed(m, everywhere, coefficients=identity)),
    "no mixing in a layer": (
        {"mixing": False, "sites": ("layers.1",)},
        lambda m: Changed(m, in_layer_1, coefficients=identity),
    ),
    "without sites": ({"sites": "layers.1.*"}, lambda m: Changed(m, in_layer_1, coefficients=nothing)),
}


@pytest.mark.parametrize("options", [{}, {"recompute": 2}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ablation(case: str, options: dict[str, Any]) -> None:
    original, converted = gpt(**options)
    given, by_hand = CASES[case]
    whole = converted(IDS)
    with ablate(converted, **given):
        found = converted(IDS)
    expected = gpt_by_hand(original, by_hand(converted), IDS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10) and not torch.allclose(found, whole, atol=1e-3)
    assert torch.equal(converted(IDS), whole)
    found.sum().backward()


def test_ablation_on_channels_first() -> None:
    torch.manual_seed(0)
    x = features(2, 3, 8, 8)
    converted: Any = mhcify(ResNet().double().eval(), (x,), n_streams=2)
    oracle.perturb(converted)
    sites = [site for site in converted.modules() if isinstance(site, HyperConnection)]
    states: list[Tensor] = []
    hook = sites[1].register_forward_hook(lambda site, args, out: states.append(args[0] if len(args) == 1 else out[0]))
    with ablate(converted, stream=1):
        converted(x)
    hook.remove()
    assert torch.allclose(states[0][:, 0], states[0][:, 1]), "of two streams the other one stands in its place"
    converted(x)


def test_streams_that_are_alike_miss_none() -> None:
    torch.manual_seed(0)
    converted = mhcify(GPT(layers=2).double(), (IDS,), init="equal")
    with torch.no_grad():
        whole = converted(IDS)
        with ablate(converted, stream=1):
            assert torch.allclose(converted(IDS), whole, atol=1e-12)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_all_is_as_before_after_an_exception() -> None:
    _, converted = gpt()
    whole = converted(IDS)
    with pytest.raises(ZeroDivisionError), ablate(converted, stream=1):
        assert hooks(converted) == 6
        raise ZeroDivisionError
    assert hooks(converted) == 0 and torch.equal(converted(IDS), whole)


@pytest.mark.slow
def test_ablation_of_a_compiled_model() -> None:
    _, converted = gpt()
    compiled = torch.compile(converted, backend="eager")
    with torch.no_grad():
        whole = compiled(IDS)
        with ablate(compiled, stream=1):
            assert not torch.allclose(compiled(IDS), whole, atol=1e-3)
        assert torch.equal(compiled(IDS), whole)


@pytest.mark.slow
def test_who_pauses_compiled_code_may_go_in_any_order() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    function = torch.compile(lambda x: x + 1, backend=backend)
    first, second = eager(), eager()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert function(torch.ones(2)).sum() == 4 and not compiled
    second.__exit__(None, None, None)
    assert function(torch.ones(2)).sum() == 4 and len(compiled) == 1


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "is to leave something out: give stream=, sites= or mixing=False"),
    "two things": ({"stream": 1, "mixing": False}, "one thing at a time"),
    "no such stream": ({"stream": 4}, "stream must be an int from 0 to 3, not 4: these sites have 4"),
    "no such site": ({"sites": "layer.1"}, "sites='layer.1' matches no site. Near: 'layers.1'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    given, said = MISTAKES[mistake]
    _, converted = gpt()
    with pytest.raises(ConfigError, match=said), ablate(converted, **given):
        pass
    assert hooks(converted) == 0


def test_a_model_that_is_not_converted() -> None:
    with pytest.raises(MHCError, match="GPT is not converted"), ablate(GPT(), stream=1):
        pass
    with pytest.raises(MHCError, match="GPT is not converted"):
        stream_lens(GPT(), IDS)


# -- the lens ----------------------------------------------------------------------------------------------------------


def test_what_streams_predict() -> None:
    original, converted = gpt()
    lens = stream_lens(converted, (IDS,))
    assert lens.depths == (*(f"layers.{k}.mhc_{j}" for k in range(3) for j in range(2)), "end")
    assert lens.columns == ("0", "1", "2", "3", "mean") and lens.predicted.shape == (7, 5, 2, 6)
    hand = Streams(converted.state_dict(), N)
    model: Any = original
    X = hand.expand(model.wte(IDS) + model.wpe(torch.arange(6)))
    states = [X]
    for number, layer in enumerate(model.layers):
        first = hand.site(f"layers.{number}.mhc_0", X, lambda u, m=layer: m.attn(m.norm1(u)))
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
        states += [first, X]
    final = model.head(model.norm(X.mean(-2))).argmax(-1)
    assert torch.equal(lens.final, final)
    for depth, state in enumerate(states):
        for column in range(N + 1):
            trunk = state.mean(-2) if column == N else state[..., column, :]
            share = model.head(model.norm(trunk)).softmax(-1)
            assert torch.equal(lens.predicted[depth, column], share.argmax(-1)), (depth, column)
            assert torch.allclose(lens.probability[depth, column], share.max(-1).values, atol=1e-9)
            assert torch.allclose(lens.entropy[depth, column], -(share * share.log()).sum(-1), atol=1e-9)
            assert torch.allclose(lens.of_final[depth, column], share.gather(-1, final[..., None])[..., 0], atol=1e-9)


def test_the_model_is_as_before() -> None:
    _, converted = gpt()
    converted.train()
    converted.layers[1].eval()  # type: ignore[index]
    modes = [module.training for module in converted.modules()]
    stream_lens(converted, {"ids": IDS})
    assert [module.training for module in converted.modules()] == modes and hooks(converted) == 0
    assert not any("post" in site.__dict__ for site in converted.modules())


class Looped(nn.Module):
    """One layer, three times: its site is the last one, and not only at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = PreNorm(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return self.head(self.norm(x))


def test_a_layer_in_a_loop_and_stretches() -> None:
    torch.manual_seed(0)
    x = features(2, 5, WIDTH)
    converted: Any = mhcify(Looped().double(), (x,))
    oracle.perturb(converted)
    lens = stream_lens(converted, x)
    assert len(lens.depths) == 7 and torch.equal(lens.predicted[-1, -1], lens.final)
    assert torch.allclose(lens.of_final[-1, -1], converted.eval()(x).softmax(-1).max(-1).values)
    stretched = mhcify(Stack([PreNorm() for _ in range(2)]).double(), (x,), n_streams={"layers.0": 2, "layers.1": 4})
    lens = stream_lens(stretched, x)
    assert lens.columns == ("0", "1", "2", "3", "mean")
    assert (
        lens.predicted[1, 2].eq(-1).all() and lens.of_final[1, 3].isnan().all() and not lens.of_final[-1].isnan().any()
    )


def test_the_plot(tmp_path: Path) -> None:
    _, converted = gpt()
    lens = stream_lens(converted, IDS)
    figure = lens.plot(tmp_path / "lens.png", decode=lambda number: f"<{number}>")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        f"<{k}>" for k in lens.predicted[:, :, 0, -1].flatten().tolist()
    ]
    assert axes.get_images()[0].get_array().shape == (7, 5) and (tmp_path / "lens.png").stat().st_size > 10_000
    assert [label.get_text() for label in axes.get_yticklabels()] == list(lens.depths)


def test_what_is_no_logits() -> None:
    converted = mhcify(Headless(), (features(2, 5, WIDTH).float(),))
    with pytest.raises(MHCError, match=r"gives no logits.*but dict"):
        stream_lens(converted, features(2, 5, WIDTH).float())
    _, converted = gpt()
    with pytest.raises(ConfigError, match="trunk=3: GPT has 1 residual streams"):
        stream_lens(converted, IDS, trunk=3)


class Headless(Stack):
    """Returns no tensor that could be logits."""

    def __init__(self) -> None:
        super().__init__([PreNorm(), PreNorm()])

    def forward(self, x: Tensor) -> Any:
        return {"hidden": super().forward(x)}
