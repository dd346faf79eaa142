"""Whoever reads the trunk gets the mean of its streams, though nothing at the conversion showed that he would.

Models are converted with a plain call; then their options, their methods, hooks and other people's extractors read the
trunk where they like. Values and gradients are compared with streams written by hand, all site parameters perturbed.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import oracle
from handmade.common import WIDTH, PreNorm, Stack, features, prenorm_by_hand
from handmade.layers import PostNorm
from mhc_rewrite import mhcify
from mhc_rewrite.errors import StreamError, UnsupportedModelError
from oracle import Streams

N, LAYERS, TIGHT = 3, 3, 1e-10


class Encoder(nn.Module):
    """An encoder with the options of the world: layers by number, early exit, turns, methods that run the blocks."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([wrap(PreNorm()) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, repr_layers: tuple[int, ...] = (), turns: int = 1, stop: int = LAYERS,
                probe: Callable[[Tensor], Any] | None = None) -> Any:  # fmt: skip
        x = self.embed(x)
        kept: dict[int, Any] = {0: x} if 0 in repr_layers else {}
        for _ in range(turns):
            for number, block in enumerate(self.blocks[:stop], 1):
                x = block(x)
                if probe is not None:
                    kept[number] = probe(x)
                elif number in repr_layers:
                    kept[number] = x
        x = self.norm(x)
        return {"x": x, "representations": kept} if kept else x

    def get_intermediate_layers(self, x: Tensor, count: int, norm: bool) -> list[Tensor]:
        """DINO's: not a call of the model."""
        x, kept = self.embed(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= LAYERS - count:
                kept.append(self.norm(x) if norm else x)
        return [x[:, 1:] for x in kept]

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """timm's."""
        x, kept = self.embed(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x.transpose(1, 2).contiguous())
        return self.norm(x), kept


def converted(wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> tuple[nn.Module, nn.Module]:
    """The original, and the converted model, perturbed."""
    torch.manual_seed(0)
    original = Encoder(wrap).double().eval()
    model = mhcify(copy.deepcopy(original), (features(2, 6, WIDTH),), n_streams=N)
    oracle.perturb(model)
    return original, model


def states(original: nn.Module, model: nn.Module, x: Tensor, turns: int = 1, inner: str = "") -> list[Tensor]:
    """X_0 to X_L by hand."""
    hand = Streams(dict(oracle.site_parameters(model)), N)
    found = [hand.expand(original.embed(x))]
    for _ in range(turns):
        for number, block in enumerate(original.blocks):
            layer = block.get_submodule(inner)
            name = ".".join(filter(None, ("blocks", str(number), inner)))
            found.append(prenorm_by_hand(layer, hand, name, found[-1]))
    return found


def means(found: list[Tensor]) -> list[Tensor]:
    return [X.mean(-2) for X in found]


def compare(got: list[Tensor], want: list[Tensor], original: nn.Module, model: nn.Module) -> None:
    """Values, and the gradients of every parameter: the originals' by hand, the sites' are shared."""
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= TIGHT * theirs.abs().max()
    torch.manual_seed(1)
    weights = [torch.randn_like(theirs) for theirs in want]
    wanted = dict(original.named_parameters())
    own = {name: p for name, p in model.named_parameters() if name in wanted}
    sites = [p for _, p in oracle.site_parameters(model)]

    def gradients(tensors: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
        loss = sum((weight * tensor.cos()).sum() for weight, tensor in zip(weights, tensors, strict=True))
        found = torch.autograd.grad(loss, [*parameters, *sites], allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    theirs = gradients(want, [wanted[name] for name in own])
    for mine, other in zip(gradients(got, list(own.values())), theirs, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-8 * max(1.0, float(other.abs().max()))


torch.manual_seed(5)
x = features(2, 6, WIDTH)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "layers,compiled",
    [((1,), False), ((1, 2), False), ((0, 3), False), ((2, 3), False), ((1, 2), True), ((0, 3), True)],
    ids=str,
)
def test_layers_by_number(layers: tuple[int, ...], compiled: bool) -> None:
    original, model = converted()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    result = run(x, repr_layers=layers)
    found = means(states(original, model, x))
    want = [original.norm(found[-1]), *(found[i] for i in layers)]
    got = [result["x"], *(result["representations"][i] for i in layers)]
    assert all(type(tensor) is Tensor for tensor in got)
    compare(got, want, original, model)


def test_early_exit() -> None:
    original, model = converted()
    compare([model(x, stop=2)], [original.norm(means(states(original, model, x))[2])], original, model)


@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_layers(norm: bool) -> None:
    original, model = converted()
    found = means(states(original, model, x))[-2:]
    want = [(original.norm(X) if norm else X)[:, 1:] for X in found]
    compare(model.get_intermediate_layers(x, 2, norm), want, original, model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_intermediates(compiled: bool) -> None:
    original, model = converted()
    call = model.forward_intermediates
    last, kept = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(x)
    found = means(states(original, model, x))
    want = [original.norm(found[-1]), *(X.transpose(1, 2) for X in found[1:])]
    compare([last, *kept], want, original, model)


@pytest.mark.parametrize("mode", ["eager", "compiled", "layer by layer", "checkpoint", "reentrant checkpoint"])
def test_hooks_that_keep_outputs(mode: str) -> None:
    original, model = converted()
    kept: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: kept.append(out))
    run: Any = model
    if mode == "compiled":
        run = torch.compile(model, backend="aot_eager")
    elif mode == "layer by layer":
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    elif "checkpoint" in mode:
        for block in model.blocks:
            _checkpointed(block, mode == "reentrant checkpoint")
    result = run(x)
    found = means(states(original, model, x))
    if "checkpoint" in mode:  # what ran inside has no gradient of its own
        want = original.norm(found[-1])
        parameters = [*original.embed.parameters(), *(p for _, p in oracle.site_parameters(model))]
        wanted = torch.autograd.grad(want.cos().sum(), parameters)
        result.cos().sum().backward()
        assert torch.allclose(result, want, rtol=TIGHT)
        own = [*model.embed.parameters(), *(p for _, p in oracle.site_parameters(model))]
        assert all(torch.allclose(p.grad, grad, rtol=1e-8, atol=1e-10) for p, grad in zip(own, wanted, strict=True))
        for mine, want in zip(kept[:LAYERS], found[1:], strict=True):
            assert mine.shape == want.shape and torch.allclose(mine, want, rtol=TIGHT, atol=TIGHT)
    else:
        compare([result, *kept], [original.norm(found[-1]), *found[1:]], original, model)


def _checkpointed(block: nn.Module, reentrant: bool) -> None:
    inner = block.forward
    block.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)


class Copying(nn.Module):
    """A wrapper, as frameworks put around layers, that passes copies of what it gets and gives."""

    def __init__(self, inner: nn.Module, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.copied = inner, copied

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(self.copied, (args, kwargs))
        return self.copied(self.inner(*args, **kwargs))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "to": lambda t: t.to(torch.float64, copy=True),
    "to the device": lambda t: t.to("cpu").double(),
    "view of itself": lambda t: t.view_as(t),
    "layout": lambda t: t.clone(memory_format=torch.contiguous_format),
}


# Each by itself, and compiled, which takes seconds, every block with another: all of them between two models.
WRAPPED = [
    *((when, (kind,) * LAYERS, False) for when in ("before", "after") for kind in COPIES),
    *((when, ("clone", "contiguous", "to"), True) for when in ("before", "after")),
    ("before", ("to the device", "layout", "clone"), True),
    ("after", ("to the device", "layout", "view of itself"), True),
]


@pytest.mark.parametrize("when,kinds,compiled", WRAPPED, ids=str)
def test_wrapped_layers_that_copy(when: str, kinds: tuple[str, ...], compiled: bool) -> None:
    """Copies of n streams are n streams: the stream goes on."""
    if when == "before" and "view of itself" in kinds:
        pytest.skip("at the conversion it is an operation on the trunk that is not lifted, and the stream ends there")
    left = iter(kinds)
    wrap = lambda block: Copying(block, COPIES[next(left)])  # noqa: E731
    original, model = converted(wrap) if when == "before" else converted()
    if when == "after":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = wrap(block)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    result = run(x)
    if when == "after":
        model.blocks = nn.ModuleList([block.inner for block in model.blocks])
    found = means(states(original, model, x, inner="inner" if when == "before" else ""))
    compare([result], [original.norm(found[-1])], original, model)


@pytest.mark.parametrize("turns", [2, 3])
def test_more_turns_than_at_the_conversion(turns: int) -> None:
    original, model = converted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (model, compiled) if turns == 2 else (model,):
        found = means(states(original, model, x, turns))
        compare([run(x, turns=turns)], [original.norm(found[-1])], original, model)


class Looped(nn.Module):
    """One block, again and again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, turns: int = 2) -> Tensor:
        for _ in range(turns):
            x = self.block(x)
        return self.head(x)


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_a_block_that_loops(turns: int) -> None:
    torch.manual_seed(0)
    original = Looped(PreNorm()).double().eval()
    model = mhcify(copy.deepcopy(original), (x,), n_streams=N)
    oracle.perturb(model)
    hand = Streams(dict(oracle.site_parameters(model)), N)
    X = hand.expand(x)
    for _ in range(turns):
        X = prenorm_by_hand(original.block, hand, "block", X)
    compare([model(x, turns=turns)], [original.head(X.mean(-2))], original, model)


def test_a_norm_behind_the_end_of_a_loop() -> None:
    """What lies behind the last site acts on the mean, so the last turn has to be known."""
    torch.manual_seed(0)
    original = Looped(PostNorm()).double().eval()
    model = mhcify(copy.deepcopy(original), (x,), n_streams=N)
    oracle.perturb(model)
    hand = Streams(dict(oracle.site_parameters(model)), N)
    block, X = original.block, hand.expand(x)
    for turn in range(2):
        X = hand.each(block.norm1, hand.site("block.mhc_0", X, block.attn))
        X = hand.site("block.mhc_1", X, block.mlp)
        X = hand.each(block.norm2, X) if turn == 0 else X
    compare([model(x)], [original.head(block.norm2(hand.collapse(X)))], original, model)
    with pytest.raises(StreamError, match=r"'block' gets in 'x' .* more often than in the example"):
        model(x, turns=3)


@torch.jit.script
def scripted(t: Tensor) -> Tensor:
    return torch.tanh(t) * t


PROBES: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda t: 2 * t + 1,
    "reduction": lambda t: t.mean((0, 1)),
    "function": lambda t: torch.cat([t, t], -1),
    "list": lambda t: torch.stack([t, t.clone()]),
    "shape": lambda t: t.new_zeros(t.shape[1:]) + t[0],
    "index": lambda t: t[..., ::2],
    "unpacked": lambda t: next(iter(t)),
    "normalised": lambda t: nn.functional.normalize(t.flatten(0, 1), dim=-1),
    "einsum": lambda t: torch.einsum("btc,bsc->bts", t, t),
    "linalg": lambda t: torch.linalg.vector_norm(t, dim=-1),
    "aten": lambda t: torch.ops.aten.tanh.default(t),
    "scripted": scripted,
}


COMPILED = [kind for kind in PROBES if kind != "unpacked"]  # Dynamo takes the parts for states, and says so


@pytest.mark.parametrize("kinds", [*([kind] for kind in PROBES), COMPILED], ids=lambda kinds: " ".join(kinds))
def test_whatever_reads(kinds: list[str]) -> None:
    """Every reader by itself, and all of them at once in one compiled graph."""
    original, model = converted()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if len(kinds) > 1 else model

    def probe(t: Tensor) -> list[Any]:
        return [PROBES[kind](t) for kind in kinds]

    result = run(x, probe=probe)
    found = means(states(original, model, x))
    want = [original.norm(found[-1]), *(read for X in found[1:] for read in probe(X))]
    got = [result["x"], *(read for reads in result["representations"].values() for read in reads)]
    compare(got, want, original, model)


def test_hooks_that_do_not_run_are_told() -> None:
    """Of layers that are a part of their parent's graph, since it adds to their stream itself."""

    class Adding(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.layers[0].mlp(x))

    torch.manual_seed(0)
    model, seen = Adding([PreNorm() for _ in range(2)]).double().eval(), []
    mhcify(model, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        model(x)
    assert seen
    model.layers[1].register_forward_hook(lambda *_: seen.append(2))
    with pytest.warns(UserWarning, match=r"'layers.1' in 'the model' has forward hooks, which do not run"):
        model(x)


def test_form() -> None:
    _, model = converted()
    seen: list[Any] = []
    forms = lambda t: seen.append((t.shape, t.size(-1), t.dim(), t.ndim, len(t), t.numel(), t.dtype, t.device,  # noqa: E731
                                   t.requires_grad, t.is_leaf, t.is_floating_point(), torch.is_tensor(t)))  # fmt: skip
    model(x, probe=forms)
    want = ((2, 6, WIDTH), WIDTH, 3, 3, 2, 12 * WIDTH, torch.float64, torch.device("cpu"), True, False, True, True)
    assert seen == [want] * LAYERS


def kept_states(model: nn.Module) -> list[Any]:
    kept: list[Any] = []
    handles = [block.register_forward_hook(lambda *given: kept.append(given[-1])) for block in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return kept


def test_what_is_kept_can_be_stored() -> None:
    original, model = converted()
    with torch.no_grad():
        kept, found = kept_states(model), means(states(original, model, x))[1:]
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    stored = [torch.load(file), pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)]
    stored.append([torch.from_numpy(t.numpy()) for t in kept])
    stored.append([torch.tensor(t.tolist(), dtype=torch.float64) for t in kept])
    for tensors in stored:
        assert all(type(t) is Tensor for t in tensors)
        assert all(torch.allclose(t, want, rtol=TIGHT) for t, want in zip(tensors, found, strict=True))
    assert repr(kept[0]) == repr(found[0]) or torch.allclose(kept[0], found[0])


def test_in_place() -> None:
    """Who writes to the trunk ends the stream there; the next layer begins another with what was written."""
    original, model = converted()
    hand = Streams(dict(oracle.site_parameters(model)), N)
    shift = features(WIDTH)

    def assign(t: Tensor) -> None:
        t[:, 0] = shift

    for write in (lambda t: t.add_(shift), lambda t: t.__iadd__(shift), lambda t: nn.functional.relu(t, inplace=True),
                  assign):  # fmt: skip
        X = states(original, model, x)[0]
        for number, block in enumerate(original.blocks):
            X = prenorm_by_hand(block, hand, f"blocks.{number}", X)
            mean = X.mean(-2).clone()
            write(mean)
            X = hand.expand(mean)
        compare([model(x, probe=write)["x"]], [original.norm(X.mean(-2))], original, model)


def test_gradients_of_the_trunk() -> None:
    """Of hooks on the tensor, of retain_grad, of autograd.grad and of a module's backward hooks: as of the mean."""
    original, model = converted()
    found = states(original, model, x)
    weight = features(2, 6, WIDTH)
    want = torch.autograd.grad((weight * original.norm(found[-1].mean(-2))).sum(), found[2])[0].sum(-2)
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        seen["out"] = out
        out.retain_grad()
        out.register_hook(lambda grad: seen.setdefault("hook", grad))

    def full(module: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]) -> None:
        seen.update({"grad_output": grad_output[0], "grad_input": grad_input[0]})

    model.blocks[1].register_forward_hook(keep)
    (weight * model(x)).sum().backward()
    retained = seen["out"].grad
    (given,) = torch.autograd.grad((weight * model(x)).sum(), [seen["out"]])
    for got in (given, seen["hook"], retained):
        assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-9)
    model.blocks[1].register_full_backward_hook(full)
    model.blocks[2].register_full_backward_hook(lambda module, into, out: seen.setdefault("next", into[0]))
    (weight * model(x)).sum().backward()
    assert torch.allclose(seen["grad_output"], want, rtol=1e-9) and torch.allclose(seen["next"], want, rtol=1e-9)
    assert seen["grad_input"].shape == (2, 6, WIDTH)


class LayerGetter(nn.ModuleDict):
    """torchvision's IntermediateLayerGetter: another container for the model's own children."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kept = {}
        for name, module in self.items():
            x = module(x)
            kept[name] = x
        return kept


def test_another_container() -> None:
    original, model = converted()
    parts = {"embed": model.embed, **{f"b{i}": block for i, block in enumerate(model.blocks)}, "norm": model.norm}
    found = means(states(original, model, x))
    compare(list(LayerGetter(parts)(x).values()), [*found, original.norm(found[-1])], original, model)


def test_kept_outputs_as_leaves() -> None:
    """A copy that takes a gradient of its own is a plain tensor."""
    original, model = converted()
    leaf = kept_states(model)[1].detach().requires_grad_()
    nn.functional.relu(leaf).cos().sum().backward()
    twin = leaf.clone().detach().requires_grad_()
    nn.functional.relu(twin).cos().sum().backward()
    assert leaf.grad.shape == (2, 6, WIDTH) and torch.allclose(leaf.grad, twin.grad, rtol=TIGHT)
    hand = Streams(dict(oracle.site_parameters(model)), N)
    X = prenorm_by_hand(original.blocks[2], hand, "blocks.2", hand.expand(twin))
    assert torch.allclose(model.norm(model.blocks[2](leaf)), original.norm(X.mean(-2)), rtol=TIGHT)


def test_gradients_at_the_end_of_a_stream() -> None:
    """Behind a last norm the layer gives a plain trunk: hooks see its gradient as it is."""
    torch.manual_seed(0)
    model = mhcify(nn.Sequential(PostNorm(), PostNorm(), nn.Linear(WIDTH, 3)).double(), (x,), n_streams=N)
    oracle.perturb(model)
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        out.register_hook(lambda gradient: seen.setdefault("hook", gradient))
        seen["out"] = out

    model[1].register_forward_hook(keep)
    model[1].register_full_backward_hook(lambda module, into, out: seen.update(full=out[0]))
    model(x).sum().backward()
    want = model[2].weight.sum(0).expand(2, 6, WIDTH)
    (given,) = torch.autograd.grad(model(x).sum(), seen["out"])
    for got in (seen["hook"], seen["full"], given):
        assert torch.allclose(got, want, rtol=TIGHT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [PreNorm, PostNorm])
def test_a_loop_under_a_checkpoint(layer: type[nn.Module], reentrant: bool) -> None:
    """Backward runs the layer again, in its place in the stream."""
    torch.manual_seed(0)
    model = mhcify(Looped(layer()).double(), (x,), n_streams=N)
    oracle.perturb(model)
    given = x.clone().requires_grad_()
    want = torch.autograd.grad(model(given).cos().sum(), [given, *model.parameters()])
    _checkpointed(model.block, reentrant)
    model(given).cos().sum().backward()
    for got, theirs in zip([given, *model.parameters()], want, strict=True):
        assert torch.allclose(got.grad, theirs, rtol=1e-10, atol=1e-12)


def compiled_regions_hand_on_attributes() -> bool:
    """Whether Dynamo knows what an attribute of a tensor is that a checkpointed region made and the next one reads."""

    class Tagged(Tensor):
        pass

    def tag(given: Tensor) -> Tensor:
        made = given.sin().as_subclass(Tagged)
        made.tag = given.cos()
        return made

    def run(given: Tensor) -> Tensor:
        made = checkpoint(tag, given, use_reentrant=False)
        return checkpoint(torch.exp, made.tag, use_reentrant=False)

    try:
        torch.compile(run, backend="eager", fullgraph=True)(torch.ones(2, requires_grad=True))
    except AssertionError:
        return False
    return True


def test_compiled_checkpoints() -> None:
    """A state passes a region that Dynamo makes a graph of its own."""
    if not compiled_regions_hand_on_attributes():
        pytest.skip("Dynamo fails in this torch where a checkpointed region hands on a tensor with an attribute")
    _, model = converted()
    want = torch.autograd.grad(model(x).cos().sum(), list(model.parameters()))
    blocks = [block.forward for block in model.blocks]

    def run(given: Tensor) -> Tensor:
        given = model.embed(given)
        for block in blocks:
            given = checkpoint(block, given, use_reentrant=False)
        return model.norm(given)

    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        result = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
        got = torch.autograd.grad(result.cos().sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(got, want, strict=True))


# Other people's extractors


def resnet(name: str = "resnet18") -> tuple[nn.Module, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    return model, torch.randn(2, 3, 64, 64, dtype=torch.float64)


def blocks_by_hand(original: nn.Module, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """torchvision's ResNet-18: what every stage gives; the second block of a stage has the sites of `layer1` alone."""
    hand = Streams(dict(oracle.site_parameters(model)), N, channel_dim=1)
    x = original.maxpool(original.relu(original.bn1(original.conv1(image))))
    found = {}
    X = hand.expand(x)
    for number, block in enumerate(original.layer1):
        branch = lambda u, b=block: b.bn2(b.conv2(b.relu(b.bn1(b.conv1(u)))))  # noqa: E731
        X = hand.site(f"layer1.{number}.mhc_0", X, branch)
        if number == 0:
            X = hand.each(torch.relu, X)
            found["layer1.0"] = hand.collapse(X)
    found["layer1"] = torch.relu(hand.collapse(X))
    x = found["layer1"]
    for stage in ("layer2", "layer3", "layer4"):
        x = found[stage] = getattr(original, stage)(x)
    return found


def test_torchvision_extractors() -> None:
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    utils = pytest.importorskip("torchvision.models._utils")
    original, image = resnet()
    model = mhcify(copy.deepcopy(original), (image,), n_streams=N)
    oracle.perturb(model)
    want = blocks_by_hand(original, model, image)
    nodes = ["layer1.0", "layer1", "layer3"]
    traced = feature_extraction.create_feature_extractor(model, {"layer1.0": "layer1.0", "layer1.1": "layer1"})(image)
    getter = utils.IntermediateLayerGetter(model, {"layer1": "layer1", "layer3": "layer3"})(image)
    before = feature_extraction.create_feature_extractor(copy.deepcopy(original), ["layer1.0.relu_1", "layer3"])
    assert set(traced) == {"layer1.0", "layer1"} and nodes
    for got in (traced, getter):
        for name, tensor in got.items():
            assert tensor.shape == want[name].shape and torch.allclose(tensor, want[name], rtol=1e-8, atol=1e-10), name
    # An extractor has a graph for each mode, and sets its forward to it.
    with pytest.raises(UnsupportedModelError, match="sets its forward anew when its mode changes"):
        mhcify(before, (image,), n_streams=N)
    assert [t.shape for t in before(image).values()] == [want["layer1"].shape, want["layer3"].shape]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name.startswith("vit") else {}
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=3, **size).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = mhcify(copy.deepcopy(original), (image,), n_streams=N)
    shapes = [t.shape for t in original.forward_intermediates(image, intermediates_only=True)]
    same = model.forward_intermediates(image, intermediates_only=True)
    plain = original.forward_intermediates(image, intermediates_only=True)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(same, plain, strict=True))
    oracle.perturb(model)
    kept: list[Any] = []
    layers = model.blocks if name.startswith("vit") else [getattr(model, f"layer{i}") for i in range(1, 5)]
    handles = [layer.register_forward_hook(lambda *given: kept.append(given[-1])) for layer in layers]
    model(image)
    for handle in handles:
        handle.remove()
    got = model.forward_intermediates(image, intermediates_only=True)
    assert [t.shape for t in got] == shapes
    if name.startswith("vit"):
        means = [t[:, 1:].transpose(1, 2).unflatten(2, (2, 2)) for t in kept]
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, means, strict=True))
    else:
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got[1:], kept, strict=True))
