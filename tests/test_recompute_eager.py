"""`recompute` of the config, without torch.compile: what stays alive, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from families_text import BY_NAME as FAMILIES
from family import output
from handmade import BY_NAME, KINDS, Kind
from handmade.common import PreNorm, Stack
from mhc_rewrite import HyperConnection, MHCConfig, mhcify
from mhc_rewrite.cost import Cost as Formulas
from mhc_rewrite.cost import Stream, best_segment
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.sites import recompute
from oracle import perturb

TOKENS, WIDTH, N = 10, 16, 4
UNIT = TOKENS * WIDTH
REPLAYS: list[int] = []  # how many operators each replay ran


class Block(nn.Module):
    """Two sites whose blocks keep nothing but what they read; between sites `trunk`."""

    def __init__(self, block: type[nn.Module] | None = None, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = (block() if block else nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.trunk = trunk or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x + self.a(x))
        return self.trunk(x + self.b(x))


class Flat(nn.Module):
    """Six sites in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def gpt() -> nn.Module:
    return Stack([PreNorm() for _ in range(3)])


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(seed))


def converted(build: Callable[[], nn.Module], length: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = build().to(dtype)
    before = len(REPLAYS)
    mhcify(model, (inputs().to(dtype),), recompute=length, **options)
    del REPLAYS[before:]  # those of the comparison with the original
    perturb(model)
    return model


def stack(sites: int = 6, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Stack([Block(**options) for _ in range(sites // 2)])


def gradients(model: nn.Module, run: Callable[[Tensor], Any] | None = None, x: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of the input and of all parameters, from the same random state each time."""
    x = (inputs() if x is None else x).clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    out = output((run or model)(x))
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def close(got: list[Tensor], want: list[Tensor], rtol: float = 1e-6) -> None:
    floor = 1e-3 * max(float(t.abs().max()) for t in want)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=rtol * max(float(its.abs().max()), floor))


class Alive(TorchDispatchMode):
    """Counts the elements of tensors that operators have made and that are still there, views of `others` apart."""

    def __init__(self, *others: Tensor) -> None:
        super().__init__()
        self.others = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in others}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self.others:
                    self.made[ref.cdata] = ref, tensor.untyped_storage().nbytes() // tensor.itemsize
        return result

    def elements(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def alive(model: nn.Module) -> int:
    """Elements that are there between forward and backward; none of them after it."""
    x = inputs()
    model.zero_grad(set_to_none=True)
    gc.disable()
    try:
        with Alive(x, *model.parameters()) as counted:
            out = model(x)
            kept = counted.elements()
            out.sum().backward()
            del out
            model.zero_grad(set_to_none=True)
            assert counted.elements() == 0, "a step leaves nothing behind"
    finally:
        gc.enable()
    return kept


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`REPLAYS`, while they are counted."""
    found = REPLAYS
    found.clear()
    plain = recompute.Segment._replay

    def counted(self: recompute.Segment) -> None:
        found.append(0)
        with monkeypatch.context() as patched:
            for name in ("pre", "post", "boundary"):
                patched.setattr(recompute.ops, name, counting(getattr(recompute.ops, name)))
            plain(self)

    def counting(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found[-1] += 1
            return operator(*args)

        return run

    monkeypatch.setattr(recompute.Segment, "_replay", counted)
    return found


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", (stack(12), Flat), ids=("layers", "one forward"))
def test_kept_states(build: Callable[[], nn.Module]) -> None:
    """n C elements a token for the first state of every segment but the first, as the cost model says."""
    sites = 12 if build is not Flat else 6
    of = Formulas(MHCConfig(), (Stream(WIDTH, sites, sites, 4),))
    kept = {length: alive(converted(build, length)) for length in (1, 2, 3, 4, 6, "auto", None)}
    states = {
        k: of.evaluate(of.kept_in_segments.states, tokens=TOKENS, segment=None if k == "auto" else k)
        for k in kept if k is not None
    }  # fmt: skip
    least = kept[6]
    assert {k: kept[k] - least for k in states} == {k: v - states[6] for k, v in states.items()}
    # Beside the states of the other sites: what every block read, and H_post and H_res.
    others = N * (sites - 1) - (states[6] // UNIT - 1)
    assert kept[None] - least == others * UNIT + sites * (UNIT + TOKENS * (N * N + N))


def test_auto_is_the_cost_model_s() -> None:
    model = converted(stack(12), "auto")
    lengths = {site.config.recompute for site in model.modules() if isinstance(site, HyperConnection)}
    assert lengths == {best_segment(N, 12)} == {3}


def test_a_graph_that_is_dropped_leaves_nothing() -> None:
    model = converted(stack(), 2)
    gc.disable()
    try:
        with Alive(*model.parameters()) as counted:
            out = model(inputs())
            assert counted.elements() > out.numel()
            del out
            assert counted.elements() == 0
    finally:
        gc.enable()


def test_a_segment_is_made_once_and_one_at_a_time(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(stack(12), 4)
    seen: list[recompute.Segment] = []
    plain = recompute.Segment._replay

    def watched(self: recompute.Segment) -> None:
        assert not any(segment.made for segment in seen)
        seen.append(self)
        plain(self)

    monkeypatch.setattr(recompute.Segment, "_replay", watched)
    model(inputs()).sum().backward(retain_graph=True)
    assert replays == [4, 4, 4]


@pytest.mark.parametrize("length", (0, True, 1.5, "some"))
def test_wrong_values(length: Any) -> None:
    with pytest.raises(ConfigError, match=r'recompute must be a number of sites from 1 on, "auto" or None, not'):
        MHCConfig(recompute=length)


def test_the_option_is_data() -> None:
    for length in (None, 3, "auto"):
        config = MHCConfig(recompute=length)
        assert MHCConfig.from_dict(config.to_dict()) == config


# -- the same gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", (1, 2, 3, 6, "auto"))
@pytest.mark.parametrize(
    "build", (stack(), Flat, lambda: Stack([PreNorm() for _ in range(3)])), ids=("", "flat", "gpt")
)
def test_gradients(build: Callable[[], nn.Module], length: Any, replays: list[int]) -> None:
    close(gradients(converted(build, length)), gradients(converted(build, None)), rtol=1e-7)
    assert replays


@pytest.mark.parametrize("connection", ("hc", "deepseek_v4"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_connections_and_dtypes(connection: str, dtype: torch.dtype, replays: list[int]) -> None:
    x = inputs().to(dtype)
    got, want = (gradients(converted(stack(), k, dtype, connection=connection), x=x) for k in (3, None))
    close(got, want, rtol=1e-6 if dtype is torch.float32 else 1e-12)
    assert len(replays) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_model(kind: Kind) -> None:
    """All layouts, calls, readers and habits of the hand-written tests."""
    results = []
    for length in (None, 2):
        model = kind.model()
        mhcify(model, kind.arguments(), **{**kind.options, "recompute": length})
        perturb(model)
        arguments = kind.arguments()
        torch.manual_seed(2)
        outputs = [t for t in tree_leaves(model(*arguments)) if isinstance(t, Tensor)]
        torch.manual_seed(3)
        sum((torch.randn_like(t) * t).sum() for t in outputs).backward()
        leaves = [*arguments, *model.parameters()]
        results.append([t.detach() for t in outputs] + [t.grad for t in leaves if t.grad is not None])
    close(results[1], results[0], rtol=1e-11)


@pytest.mark.parametrize("name", ("post-norm", "pre-activation, 2d"))
def test_layouts(name: str, replays: list[int]) -> None:
    """Two operators a replay: with a norm on the trunk `pre` and the `post` that the norm reads, channels first or last
    `pre` and `boundary`."""
    kind = BY_NAME[name]
    model = kind.model()
    mhcify(model, kind.arguments(), **{**kind.options, "recompute": 2})
    next(t for t in tree_leaves(model(*kind.arguments())) if isinstance(t, Tensor)).sum().backward()
    assert max(replays) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ("GPT-2", "Llama", "T5", "BERT"))
def test_transformers_with_and_without_their_checkpointing(name: str) -> None:
    family = FAMILIES[name]
    args, kwargs = family.arguments()
    results = []
    for length, reentrant in ((None, None), (2, None), (2, False), (2, True)):
        model = family.model()
        mhcify(model, family.example(), recompute=length)
        perturb(model)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        out = output(model(*args, **kwargs))
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out.detach(), *(p.grad for _, p in model.named_parameters() if p.grad is not None)])
    for got in results[1:]:
        close(got, results[0], rtol=1e-9)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype: torch.dtype, replays: list[int]) -> None:
    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return model(x)

        return cast

    models = [converted(stack(), length) for length in (3, None)]
    got, want = (gradients(model, run(model)) for model in models)
    close(got, want, rtol=1e-2)
    assert replays == [3, 3]


@pytest.mark.parametrize("on_the_trunk", (False, True), ids=("in the blocks", "on the trunk"))
def test_dropout_has_the_same_mask_again(on_the_trunk: bool, replays: list[int]) -> None:
    class Dropped(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4))

    build = stack(trunk=nn.Dropout(0.4)) if on_the_trunk else stack(block=Dropped)
    close(gradients(converted(build, 6)), gradients(converted(build, None)))
    assert replays == ([1] * 6 if on_the_trunk else [6])


def by_hand(run: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Sites called by a test itself, with and without recomputation."""
    results = []
    for length in (3, None):
        torch.manual_seed(0)
        sites = nn.ModuleList(HyperConnection(WIDTH, MHCConfig(recompute=length), index=k) for k in range(3))
        with torch.no_grad():
            for parameter in sites.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        weight = (torch.randn(WIDTH, WIDTH) / WIDTH).requires_grad_()
        try:
            with recompute.recomputation():
                out = run(sites, weight, inputs().unsqueeze(-2).expand(-1, -1, N, -1))
        finally:
            recompute.forget()
        out.square().sum().backward()
        results.append([weight.grad, *(p.grad for p in sites.parameters() if p.grad is not None)])
    close(*results)


def test_two_sites_that_read_one_state() -> None:
    def run(sites: Any, weight: Tensor, state: Tensor) -> Tensor:
        u, mix = sites[0].pre(state)
        state = sites[0].post(state, u @ weight, mix)
        branches = [site.pre(state)[0] @ weight for site in sites[1:]]
        return torch.stack(branches)

    by_hand(run)


def test_a_tensor_changed_before_backward_is_an_error() -> None:
    """Hooks switch autograd's own check off."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.inner(x)
            return self.seen * self.seen

    model = converted(stack(block=Held), 2)
    out = model(inputs())
    with torch.no_grad():
        model.layers[0].a.seen.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version 1; expected version 0"):
        out.sum().backward()


# -- other ways to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", (True, False))
def test_accumulated_gradients(interleaved: bool) -> None:
    results = []
    for length in (3, None):
        model = converted(stack(), length)
        losses: list[Tensor] = []
        for seed in (1, 2):
            losses.append(model(inputs(seed)).square().sum())
            if not interleaved:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    close(*results)


def test_backward_twice(replays: list[int]) -> None:
    model = converted(stack(), 3)
    loss = model(inputs()).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    close([p.grad for p in model.parameters() if p.grad is not None], [2 * grad for grad in once])
    assert replays == [3, 3, 3, 3]


def test_gradients_of_a_part() -> None:
    got, want = ([], [])
    for length, found in ((3, got), (None, want)):
        model = converted(stack(), length)
        loss = model(inputs()).square().sum()
        for name in ("layers.2.a.weight", "layers.0.b.weight", "layers.2.mhc_1.phi"):
            found += torch.autograd.grad(loss, model.get_parameter(name), retain_graph=True)
    close(got, want)


def test_frozen_parameters() -> None:
    """Nodes that backward never runs keep their handles until the graph is gone."""
    results = []
    for length in (3, None):
        model = converted(stack(), length)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mhc" in name or "layers.1" in name)
        results.append(gradients(model))
    close(*results)


@pytest.mark.parametrize("reentrant", (True, False))
def test_beside_the_users_checkpoints(reentrant: bool, replays: list[int]) -> None:
    """The second layer is the user's: it begins and ends a segment, and is recomputed as they say."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = Block(), Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(checkpoint(self.second, self.first(x), use_reentrant=reentrant))

    got, want = (gradients(converted(Outer, length)) for length in (6, None))
    close(got, want)
    assert sorted(replays) == ([2, 2, 2] if reentrant else [2, 2])


def test_a_checkpoint_in_a_block(replays: list[int]) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: self.down(self.up(y).tanh()), x, use_reentrant=False)

    close(gradients(converted(stack(block=Inner), 3)), gradients(converted(stack(block=Inner), None)))
    assert replays == [3, 3]


def test_the_users_hooks_see_everything(replays: list[int]) -> None:
    model, seen = converted(stack(), 3), [0, 0]

    def run(x: Tensor) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            seen[0] += 1
            return tensor

        def unpack(tensor: Tensor) -> Tensor:
            seen[1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return model(x)

    want = gradients(converted(stack(), None))
    close(gradients(model, run), want)
    assert seen[0] == seen[1] > 60 and not replays


def test_copies_and_pickles(replays: list[int]) -> None:
    model = converted(stack(), 3)
    want = gradients(model)
    del replays[:]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(gradients(other), want)
    assert replays == [3] * 4


def test_without_gradients_nothing_is_held(replays: list[int]) -> None:
    model = converted(stack(), 3)
    with torch.no_grad(), Alive(*model.parameters()) as counted:
        out = model(inputs())
        assert counted.elements() == out.numel()
    assert not replays


def test_after_an_error_nothing_is_held() -> None:
    class Failing(nn.Linear):
        fails = False

        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            if Failing.fails:
                raise ValueError("not today")
            return super().forward(x)

    model = converted(stack(block=Failing), 3)
    Failing.fails = True
    with Alive(*model.parameters()) as counted, pytest.raises(ValueError, match="not today"):
        model(inputs())
    gc.collect()
    assert counted.elements() == 0
    Failing.fails = False
    close(gradients(model), gradients(converted(stack(block=Failing), None)))


@pytest.fixture(autouse=True)
def nothing_at_hand() -> Iterator[None]:
    """No test leaves hooks on or a state behind."""
    yield
    assert not recompute._thread.on and not recompute._thread.at_hand
