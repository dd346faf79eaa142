"""Residual adds in every form that people write them in, and what is none though it looks like one.

Each form's perturbed conversion is held against a model written by hand, in both modes, values and gradients.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from golden import WIDTH, Layer, features
from handmade import hosts, spellings, trunk_operations
from handmade.common import Kind
from mhc_rewrite import mhcify, plan, unmhcify
from mhc_rewrite.capture.record import is_user_code
from mhc_rewrite.errors import MHCError, NoResidualError
from mhc_rewrite.sites.hyper_connection import HyperConnection
from test_perturbed import check_by_hand

KINDS: tuple[Kind, ...] = (*spellings.KINDS, *trunk_operations.KINDS, *hosts.KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sites(kind: Kind) -> None:
    inputs = kind.arguments()
    found = plan(kind.model(), inputs)
    assert tuple(tuple(dict.fromkeys(s.name for s in stream.sites)) for stream in found.streams) == kind.streams
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}
    assert all(torch.equal(mine, other) for mine, other in zip(inputs, kind.arguments()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    check_by_hand(kind, 4)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + 2 * y if bool(x.sum() > 0) else x - y


def test_a_traced_function_is_neither_its_python_nor_its_name() -> None:
    """It has gone one way once and for all, so that its Python can't stand for it: what it adds stays out of sight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the branch, and that tracing is deprecated
        traced = torch.jit.trace(add, (torch.ones(2), torch.ones(2)))

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return traced(x, self.f(x))

    with pytest.raises(NoResidualError):
        mhcify(nn.Sequential(Traced(), Traced()), (torch.randn(2, 5, WIDTH),))


# -- what writes to memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("x += p", "mul_", "setitem", "sub_"))
def test_a_model_may_write_to_its_input(form: str) -> None:
    """The caller's example stays; a call writes to its argument as the original does."""
    torch.manual_seed(0)
    model = hosts.WritesToItsInput(form).double()
    x = torch.randn(2, 5, hosts.WIDTH).double()
    example = x.clone()
    assert len(plan(model, (example,)).sites) == 2 and torch.equal(example, x)
    original = copy.deepcopy(model)
    mhcify(model, (example,))
    assert torch.equal(example, x)
    mine, other = x.clone(), x.clone()
    torch.testing.assert_close(model(mine), original(other))
    assert torch.equal(mine, other) and not torch.equal(mine, x)
    oracle.perturb(model)
    hand = oracle.Streams(dict(oracle.site_parameters(model)), 4)
    X = hand.expand(mine)  # as it was left behind
    for k, layer in enumerate(original.layers):
        X = hosts.sequential_by_hand(layer, hand, f"layers.{k}", X)
    torch.testing.assert_close(model(x.clone()), hand.collapse(X))


def test_an_example_is_one_tensor_where_it_was_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(hosts.sequential() for _ in range(2))

        def forward(self, x: Tensor, same: Tensor) -> Tensor:
            assert x is same
            for layer in self.layers:
                x = layer(x)
            return x

    x = torch.randn(2, 5, hosts.WIDTH)
    assert len(plan(Twice(), (x, x)).sites) == 2


def out_argument(self: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, self.a(x), out=y)
    return torch.add(y, self.b(y), out=y)


def test_out_argument() -> None:
    """Autograd knows no `out=`: such a model only ever runs without gradients."""
    x = features()
    with torch.no_grad():
        model = mhcify(Layer(out_argument), (x,))
        torch.testing.assert_close(model(x), Layer.forward(copy.deepcopy(unmhcify(copy.deepcopy(model))), x))
        assert oracle.site_names(model.state_dict()) == ["mhc_0", "mhc_1"]
        oracle.perturb(model)
        hand = oracle.Streams(dict(oracle.site_parameters(model)), 4)
        X = hand.site("mhc_1", hand.site("mhc_0", hand.expand(x), model.a), model.b)
        torch.testing.assert_close(model(x), hand.collapse(X))


# -- containers ------------------------------------------------------------------------------------------------------


def test_a_container_with_sites_holds_what_it_held() -> None:
    model = nn.Sequential(hosts.sequential(), hosts.ResidualList([nn.Linear(16, 16)]),
                          hosts.ResidualDict({"mlp": nn.Linear(16, 16)}))  # fmt: skip
    x = torch.randn(2, 5, hosts.WIDTH)
    before = [list(model[0]), list(model[1]), list(model[2].items())]
    mhcify(model, (x,))
    for case in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [len(part) for part in case] == [4, 1, 1]
        assert isinstance(case[0][-1], nn.Linear) and isinstance(case[0][1:], hosts.ResidualSequential)
        assert [type(part) for part in case[0]] == [type(part) for part in before[0]]
        assert list(case[2]) == ["mlp"] and "mhc_0" not in case[2] and [*case[2].values()] == [case[2]["mlp"]]
        assert not any(isinstance(part, HyperConnection) for part in (*case[0], *case[1], *case[2].values()))
        assert isinstance(case.get_submodule("0.mhc_0"), HyperConnection)
        torch.testing.assert_close(case(x), model(x))
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert {"0.mhc_0.phi", "1.mhc_0.phi", "2.mhc_0.phi", "2.mhc_1.phi"} <= model.state_dict().keys()
    unmhcify(model)
    assert [list(model[0]), list(model[1]), list(model[2].items())] == before
    assert type(model[0]) is hosts.ResidualSequential and not oracle.site_names(model.state_dict())


def test_a_container_learns_other_calls() -> None:
    """An unseen call runs the original forward, which iterates the container."""
    model = mhcify(nn.Sequential(hosts.sequential(), hosts.sequential()), (torch.randn(2, 5, hosts.WIDTH),)).train()
    oracle.perturb(model)
    x = torch.randn(7, hosts.WIDTH)
    again = mhcify(unmhcify(copy.deepcopy(model)), (x,)).train()
    again.load_state_dict(model.state_dict())
    with pytest.raises(MHCError, match="axes"):  # streams are told by their rank
        model(x)
    y = torch.randn(1, 3, hosts.WIDTH)
    torch.testing.assert_close(model(y)[0], again(y[0]))


# -- what is none ----------------------------------------------------------------------------------------------------


def filtered(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    y = F.avg_pool1d(x, 3, 1, 1) - x  # this
    return x + self.a(y)


def high_pass(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    return x + self.a(x - F.avg_pool1d(x, 3, 1, 1))  # this


def offset_attention(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    return x + torch.relu(self.norm1(x - self.a(x)))  # this


def recurrent_gate(self: Any, x: Tensor) -> Tensor:
    """GRU's state: `h + z * (n - h)` in one step; the gate depends on the trunk."""
    x = x + self.b(x)
    z = torch.sigmoid(self.a(x))
    return self.norm1(x + z * (torch.tanh(self.a(x)) - x)) + self.b(x)  # this


def gated_lerp(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    x = x + self.a(x)
    return torch.lerp(x, torch.tanh(self.a(x)), torch.sigmoid(self.b(x)))  # this


def complex_product(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    q, p = self.a(x), self.b(x)
    return x + self.a(q * 0.6 - p * 0.8)  # this


NONE = {
    # forward: the rule for its marked line, the sites that it has all the same
    filtered: ("filter", 2),
    high_pass: ("filter", 2),
    offset_attention: ("fork", 2),
    recurrent_gate: ("fork", 2),
    gated_lerp: (None, 2),
    complex_product: ("no-ancestor", 2),
}


@pytest.mark.parametrize("forward", NONE, ids=lambda forward: forward.__name__)
def test_what_looks_like_one(forward: Callable[..., Any]) -> None:
    rule, sites = NONE[forward]
    found = plan(Layer(forward), (features(),))
    assert len(found.sites) == sites
    rules = {r.rule for r in found.rejections if r.source is not None and "# this" in r.source.text}
    assert rule in rules or (rule is None and rules)
    model = Layer(forward).double()
    x = features().double()
    want = model(x)
    torch.testing.assert_close(mhcify(model, (x,))(x), want)


def shuffled(self: Any, x: Tensor) -> Tensor:
    return x.roll(1, -1)


def without_mean(self: Any, x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def softmaxed(self: Any, x: Tensor) -> Tensor:
    return x.softmax(1)


def turned(self: Any, x: Tensor) -> Tensor:
    return x.roll((1, 1), (1, 2))


def extended(self: Any, x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1)


ENDS = {shuffled: "roll", without_mean: "sub", softmaxed: "softmax", turned: "roll", extended: "cat"}


@pytest.mark.parametrize("operation", ENDS, ids=lambda operation: operation.__name__)
def test_what_ends_a_stream_says_so(operation: Callable[..., Any]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        x = operation(self, x)
        x = x + self.a(x)
        return x + self.b(x)

    found = plan(Layer(forward), (features(),))
    assert [len(stream.sites) for stream in found.streams] == [2, 2]
    (rejection,) = [r for r in found.rejections if r.rule == "trunk-operation"]
    assert repr(ENDS[operation]) in rejection.reason and rejection.source.line


def moved_between(self: Any, x: Tensor) -> Tensor:
    """The branch reads before the tokens change places."""
    x = x + self.a(x)
    x = x + self.b(x)
    return x.transpose(0, 1) + self.a(x).transpose(0, 1)  # this


def cut_between(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    x = x + self.b(x)
    return x[:, :1] + self.a(x)[:, :1]  # this


@pytest.mark.parametrize("forward", (moved_between, cut_between), ids=lambda forward: forward.__name__)
def test_tokens_that_move_between_read_and_add(forward: Callable[..., Any]) -> None:
    found = plan(Layer(forward), (features(5, 5, WIDTH),))
    assert len(found.sites) == 2
    assert "moved-tokens" in {r.rule for r in found.rejections if "# this" in r.source.text}
    model = Layer(forward).double()
    x = features(5, 5, WIDTH).double()
    want = model(x)
    torch.testing.assert_close(mhcify(model, (x,))(x), want)


def test_reshaped_between_read_and_add() -> None:
    """The coefficients follow."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.flatten(0, 1) + self.a(x).view(-1, WIDTH)
        return x.view(2, 5, WIDTH) + self.b(x)[None].unflatten(1, (2, 5)).squeeze(0)

    x = features().double()
    model = mhcify(Layer(forward).double(), (x,))
    oracle.perturb(model)
    hand = oracle.Streams(dict(oracle.site_parameters(model)), 4)
    X = hand.site("mhc_0", hand.expand(x.flatten(0, 1)), model.a)
    X = hand.site("mhc_1", X, model.b)
    torch.testing.assert_close(model(x), hand.collapse(X).view(2, 5, WIDTH))


def part_and_rest(self: Any, x: Tensor) -> Tensor:
    """Two parts of one trunk go on by themselves."""
    x = x + self.a(x)
    first, rest = x[:, :2], x[:, 2:]
    first = first + self.b(first)
    rest = rest + self.a(rest)
    rest = rest + self.b(rest)
    return torch.cat([first, rest], 1)


def test_parts_of_a_trunk() -> None:
    x = features().double()
    assert [len(stream.sites) for stream in plan(Layer(part_and_rest), (x.float(),)).streams] == [2, 2]
    model = mhcify(Layer(part_and_rest).double(), (x,))
    oracle.perturb(model)
    hand = oracle.Streams(dict(oracle.site_parameters(model)), 4)
    X = hand.site("mhc_0", hand.expand(x), model.a)
    first = hand.site("mhc_1", hand.each(lambda x: x[:, :2], X), model.b)
    rest = hand.site("mhc_2", hand.expand(hand.collapse(X)[:, 2:]), model.a)
    rest = hand.site("mhc_3", rest, model.b)
    torch.testing.assert_close(model(x), torch.cat([hand.collapse(first), hand.collapse(rest)], 1))


def seen_by_another_name(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    rows = x.flatten(0, 1)
    x = torch.relu_(x)
    return (x + self.b(x)).flatten(0, 1) * rows


def test_in_place_on_the_trunk_and_read_by_another_name() -> None:
    """The stream ends before the memory that two names share changes."""
    x = features().double()
    model = Layer(seen_by_another_name).double()
    with pytest.raises(MHCError, match=r"single-site|trunk-operation"):
        mhcify(model, (x,))


# -- lines of packages whose folder is called like torch's -----------------------------------------------------------

SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.dropout = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        x = x + self.dropout(self.a(x))
        return x + self.b(x)
"""


@pytest.mark.parametrize("name", ("torchvision", "torch_geometric", "torchtitan", "torch"))
def test_packages_whose_name_begins_with_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports name their own lines, and later calls of another kind find the same sites."""
    torch_folder = tmp_path / "site-packages" / "torch"
    monkeypatch.setattr("mhc_rewrite.capture.record._TORCH_CODE", f"{torch_folder}/")
    folder = torch_folder.parent / name / "models" if name != "torch" else tmp_path / "torch" / "mine"
    folder.mkdir(parents=True)
    (folder / "blocks.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("blocks", folder / "blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = nn.Sequential(module.Block(), module.Block())
    x = torch.randn(2, 5, 16)
    found = plan(model, (x,))
    assert {(site.source.file, site.source.text) for site in found.sites} == {
        (str(folder / "blocks.py"), "x = x + self.dropout(self.a(x))"),
        (str(folder / "blocks.py"), "return x + self.b(x)"),
    }
    block = mhcify(module.Block(), (x,))
    assert block(x, mask=torch.ones(2, 5, 1)).shape == x.shape


def test_what_is_user_code() -> None:
    folder = Path(torch.__file__).parent
    assert not is_user_code(str(folder / "functional.py"), "einsum")
    assert not is_user_code(str(folder / "nn" / "modules" / "module.py"), "_call_impl")
    assert is_user_code(str(folder / "nn" / "modules" / "linear.py"), "forward")
    assert is_user_code(str(folder / "nn" / "modules" / "transformer.py"), "_sa_block")
    assert is_user_code(f"{folder}vision/ops/misc.py", "forward")
    assert is_user_code("/home/me/torch/contextlib.py", "forward")
    assert is_user_code("/home/me/mhc_rewrite_models/model.py", "forward")
    assert not is_user_code(copy.__file__.replace("copy.py", "contextlib.py"), "__enter__")


def test_a_difference_inside_of_a_branch_reads_what_the_branch_reads() -> None:
    x = features().double()
    model = mhcify(Layer(offset_attention).double(), (x,))
    oracle.perturb(model)
    hand = oracle.Streams(dict(oracle.site_parameters(model)), 4)
    X = hand.site("mhc_0", hand.expand(x), model.b)
    X = hand.site("mhc_1", X, lambda u: torch.relu(model.norm1(u - model.a(u))))
    torch.testing.assert_close(model(x), hand.collapse(X))
