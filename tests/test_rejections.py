"""What is no residual add, and under which rule: in the recording of a run, and in a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden import WIDTH, Layer, capture, features, text
from mhc_rewrite import plan
from mhc_rewrite.capture.record import record
from mhc_rewrite.passes.find_carriers import Carrier, find_carriers
from mhc_rewrite.plans import Rejection


def carriers_of(model: nn.Module, *inputs: Tensor, min_sites: int = 1) -> tuple[list[Carrier], list[Rejection]]:
    recording, _ = record(model, inputs or (features(),), {})
    return find_carriers(recording, min_sites)


# -- decoys ----------------------------------------------------------------------------------------------------------
# Every one holds one add, or one with `# this` behind it, that is no site.


def rope(self: Any, x: Tensor) -> Tensor:
    q = self.a(x)
    cos, sin = torch.ones(5, WIDTH).cos(), torch.ones(5, WIDTH).sin()
    turned = torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], dim=-1)
    return self.b(q * cos + turned * sin)


def gelu_polynomial(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    inner = h + 0.044715 * h**3
    return self.b(0.5 * h * torch.tanh(inner))


def position(self: Any, x: Tensor) -> Tensor:
    return self.a(x + self.gamma)


def mask(self: Any, x: Tensor) -> Tensor:
    scores = self.a(x) @ self.b(x).mT
    return (scores + torch.zeros(5, 5)).softmax(-1) @ x


def projection_shortcut(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.b(torch.relu(self.norm1(x)))


def modulation(self: Any, x: Tensor) -> Tensor:
    scale, shift = self.a(x), self.b(x)
    return x * (scale - 1) + shift


def gate(self: Any, x: Tensor) -> Tensor:
    g = torch.sigmoid(self.a(x))
    return g * x + (1 - g) * self.b(x)  # this


def experts(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in (self.a, self.b):
        out = out + expert(x) * 0.5
    return out


def activation(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    return h + torch.tanh(h)


def whole_stage(self: Any, x: Tensor) -> Tensor:
    start = x
    for block in (self.a, self.b, self.a):
        x = x.add(block(x))
    return self.norm1(x) + start  # this


def several_outputs(self: Any, x: Tensor) -> Tensor:
    return self.a(x[:, :1]) + x[:, 1:2].repeat(1, 1, 1)


DECOYS = {
    # forward: (rule in the recording, rule in the graph, sites in the graph)
    rope: ("no-mixing", "no-mixing", 0),
    gelu_polynomial: ("no-mixing", "no-mixing", 0),
    position: ("broadcast", "broadcast", 0),
    mask: ("broadcast", "broadcast", 0),
    projection_shortcut: ("no-ancestor", "no-ancestor", 0),
    modulation: (None, "modulation", 0),  # on the recording it might be one: the graph decides
    gate: (None, "modulation", 0),
    experts: ("no-ancestor", "no-ancestor", 0),
    activation: ("no-mixing", "no-mixing", 0),
    whole_stage: ("long-skip", "long-skip", 3),
    several_outputs: ("no-ancestor", "no-ancestor", 0),
}


@pytest.mark.parametrize("forward", DECOYS, ids=lambda forward: forward.__name__)
def test_decoys(forward: Callable[..., Any]) -> None:
    in_recording, in_graph, sites = DECOYS[forward]
    layer = Layer(forward)
    carriers, rejections = carriers_of(layer)
    assert {r.rule for r in rejections} == ({in_recording} if in_recording else set())
    assert bool(carriers) is (in_recording is None or sites > 0)
    captured, residuals = capture(layer)
    assert {r.rule for r in residuals.rejections} == {in_graph}
    assert sum(len(trunk.sites) for trunk in residuals.trunks) == sites
    for rejection in (*rejections, *residuals.rejections):
        assert rejection.source is not None and rejection.source.file == __file__
        assert " + " in rejection.source.text and rejection.reason
        assert ("# this" in rejection.source.text) or forward not in (gate, whole_stage)
    assert text(captured.graph).count("add(") >= 1  # it is still there


def test_no_floating_tensors_no_rejection() -> None:
    """Adds of sizes, numbers and indices are nobody's near miss; neither is a tensor with itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1]) + torch.arange(x.shape[1])
        h = self.a(x)[:, index // 2] + 1
        return h + h

    assert carriers_of(Layer(forward)) == ([], [])
    assert capture(Layer(forward))[1].rejections == []


# -- rules that need a graph -----------------------------------------------------------------------------------------


def alias(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    rows = x.flatten(0, 1)
    x += self.a(x)  # this
    return self.b(x) * rows.mean()


def fork(self: Any, x: Tensor) -> Tensor:
    y = x + self.a(x)
    z = x + self.b(x)  # this
    return y * z


def softmax_between(self: Any, x: Tensor) -> Tensor:
    """The read is before an operation that mixes tokens, the add behind it."""
    y = x.softmax(1)
    return y + self.a(x)  # this


def view_between(self: Any, x: Tensor) -> Tensor:
    """The branch says that C is axis 1; axes before the last can be moved only where C is the last."""
    y = x.transpose(0, 1).transpose(0, 1)
    return y + F.conv1d(x, torch.ones(5, 5, 1))  # this


def middle_axis(self: Any, x: Tensor) -> Tensor:
    x = x.unsqueeze(1).transpose(2, 3)
    return x + self.a(x.transpose(2, 3)).transpose(2, 3)  # this


@pytest.mark.parametrize(
    "forward,rule",
    [
        (alias, "alias"),
        (fork, "fork"),
        (softmax_between, "no-ancestor"),
        (view_between, "not-per-token"),
        (middle_axis, "axis"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_rules_of_the_graph(forward: Callable[..., Any], rule: str) -> None:
    _, residuals = capture(Layer(forward))
    found = [r for r in residuals.rejections if "# this" in r.source.text]
    assert [r.rule for r in found] == [rule]
    assert sum(len(trunk.sites) for trunk in residuals.trunks) == (1 if forward is fork else 0)


def in_place_is_no_alias(self: Any, x: Tensor) -> Tensor:
    """A name for the same tensor is no alias: it means the sum, too."""
    x = x * 1
    same = x
    x += self.a(x)
    return same * 2


def test_a_second_name_is_no_alias() -> None:
    captured, residuals = capture(Layer(in_place_is_no_alias))
    assert [len(trunk.sites) for trunk in residuals.trunks] == [1] and residuals.rejections == []
    assert text(captured.graph).splitlines()[-2] == "mul_1 = mul(iadd, 2)"  # reads the sum


# -- carriers --------------------------------------------------------------------------------------------------------


class AddModule(nn.Module):
    """As BERT's output modules: the add is in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + residual)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(WIDTH, WIDTH), AddModule()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x), x)


class PostNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.dense, self.output = Attention(), nn.Linear(WIDTH, WIDTH), AddModule()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(torch.relu(self.dense(x)), x)


def test_carriers_are_where_trunk_and_branch_part() -> None:
    model = nn.Sequential(PostNormBlock(), PostNormBlock())
    recording, _ = record(model, (features(),), {})
    carriers, rejections = find_carriers(recording, 2)
    found = {recording.calls[carrier.call].name: carrier.inlined for carrier in carriers}
    inlined = {"attention", "attention.output", "output"}
    assert found == {name: {f"{name}.{part}" for part in inlined} for name in ("0", "1")}
    assert rejections == []


def test_too_few_sites_are_no_carriers() -> None:
    carriers, rejections = carriers_of(Attention(), min_sites=2)
    assert carriers == []
    assert [(r.rule, r.module) for r in rejections] == [("single-site", "output")]
    assert rejections[0].source.text == "return self.norm(self.dense(hidden) + residual)"


def test_parents_are_captured_whole() -> None:
    model = nn.Sequential(nn.Sequential(PostNormBlock(), PostNormBlock()), PostNormBlock())
    recording, _ = record(model, (features(),), {})
    carriers, _ = find_carriers(recording, 2, frozenset({"0"}))
    assert [recording.calls[carrier.call].name for carrier in carriers] == ["0", "1"]
    assert {"0.0", "0.1", "0.0.attention.output", "0.1.output"} <= carriers[0].inlined


class BiasedBlock(nn.Module):
    """A site and a broadcast add, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x + self.bias)


def test_layers_repeat_and_rejections_do_not() -> None:
    model = nn.Sequential(*(BiasedBlock() for _ in range(4)))
    carriers, rejections = carriers_of(model, min_sites=2)
    assert len(carriers) == 4
    assert [(r.rule, r.module) for r in rejections] == [("broadcast", "0")]


def test_a_plan_rejects_an_add_once() -> None:
    found = plan(nn.Sequential(*(BiasedBlock() for _ in range(4))), (features(),))
    assert [site.name for site in found.sites] == [f"{i}.mhc_0" for i in range(4)]
    assert len([r for r in found.rejections if r.source.text == "return x + self.a(x + self.bias)"]) == 1


# -- the axis of C ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transpose",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1),
        lambda x: torch.swapaxes(x, -1, -2),
        lambda x: x.movedim(1, 2),
        lambda x: x.mT,
        lambda x: x.mH,
        lambda x: x.adjoint(),
        lambda x: torch.einsum("bct->btc", x),
    ],
    ids=["transpose", "permute", "swapaxes", "movedim", "mT", "mH", "adjoint", "einsum"],
)
def test_width_is_the_axis_that_the_branch_mixes(transpose: Callable[[Tensor], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + transpose(self.a(transpose(x)))
        return x + transpose(self.b(transpose(x)))

    found = plan(Layer(forward), (features(2, WIDTH, 5),))
    assert [(site.width, site.channel_dim) for site in found.sites] == [(WIDTH, 1)] * 2


def test_a_matrix_from_the_left_mixes_tokens() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a.weight @ x
        return x + torch.matmul(self.b.weight, x)

    found = plan(Layer(forward), (features(2, WIDTH, 5),))
    assert [(site.width, site.channel_dim) for site in found.sites] == [(5, -1)] * 2
