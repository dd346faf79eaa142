"""`recompute` of the backend "mhc": which states are kept, that nothing else changes, and that caches know of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mhc_rewrite
from families_text import BY_NAME
from family import output
from handmade.common import Stack
from mhc_rewrite import mhcify
from mhc_rewrite.passes import annotate_recompute as recomputation
from mhc_rewrite.passes.annotate_recompute import Segments, annotate_recompute
from mhc_rewrite.passes.fuse_boundaries import fuse_boundaries
from oracle import perturb
from test_lowering import converted, inputs, operators, step, worst

TOKENS, WIDTH, N = 10, 16, 4
UNIT = TOKENS * WIDTH


class Block(nn.Module):
    """Two sites; between them nothing, a norm or dropout on the trunk."""

    def __init__(self, trunk: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.trunk = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), trunk
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x + self.dropout(self.a(self.norm(x))))
        return self.trunk(x + self.dropout(self.b(self.norm(x))))


def blocks(sites: int, trunk: type[nn.Module] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = [Block(nn.Identity() if trunk is None else trunk(WIDTH), **options) for _ in range(sites // 2)]
    model = mhcify(Stack(made), (inputs(),))
    perturb(model)
    return model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled graphs on disk are those of the test, so that a stale one would be found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, recompute: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return mhc_rewrite.compile(model, fullgraph=True, options={"recompute": recompute, **options})


def saved(model: nn.Module, run: Any) -> int:
    """Elements that pass from the forward graph to the backward graph, parameters apart."""
    own = {p.data_ptr() for p in model.parameters()}
    out = run(inputs())
    elements = sum(t.numel() for t in out.grad_fn.saved_tensors if t.data_ptr() not in own)
    out.sum().backward()  # caches take an entry once its backward is compiled
    return elements


# -- segments on the graph of Dynamo ---------------------------------------------------------------------------------


def annotated(run: Any, recompute: Any) -> tuple[Segments, list[str], list[Any]]:
    """The segments, the operators of the graph, and the segment of each."""
    found: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        fuse_boundaries(graph_module)
        found.append(annotate_recompute(graph_module, recompute=recompute))
        code = graph_module.code
        assert not annotate_recompute(graph_module, recompute=recompute).modified and graph_module.code == code
        nodes = [n for n in graph_module.graph.nodes if "mhc_rewrite." in str(n.target)]
        found.append(operators(graph_module))
        found.append([n.meta.get("custom", {}).get(recomputation.SEGMENT) for n in nodes])
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend, fullgraph=True)()
    return tuple(found)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "recompute,lengths",
    [(1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (9, [6]), ("auto", [2, 2, 2]), (None, None)],
)
def test_segments(recompute: Any, lengths: list[int] | None) -> None:
    model, x = converted(layers=3), inputs()
    done, names, _ = annotated(lambda: model(x), recompute)
    assert done.lengths == ([lengths] if lengths else [])
    parts = len(lengths) if lengths else 1
    assert done.parted == parts - 1
    assert (names.count("pre"), names.count("boundary"), names.count("post")) == (parts, 6 - parts, parts - 1)


def test_what_is_marked() -> None:
    model, x = converted(layers=2), inputs()
    _, names, segments = annotated(lambda: model(x), 3)
    assert list(zip(names, segments)) == [
        ("pre", 0), ("boundary", 0), ("boundary", 0), ("post", 0), ("pre", 1), ("post_collapse", None),
    ]  # fmt: skip


def test_every_stream_has_its_own_segments() -> None:
    """Encoder and decoder: no segment crosses from one to the other."""
    family = BY_NAME["T5"]
    model = mhcify(family.model(), family.example())
    args, kwargs = family.arguments()
    done, _, _ = annotated(lambda: output(model(*args, **kwargs, use_cache=False)), 4)
    sites = [len(stream) for stream in family.streams]
    assert [sum(lengths) for lengths in done.lengths] == sites
    assert all(length == 4 for lengths in done.lengths for length in lengths[:-1])


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_kept_states() -> None:
    """n C elements a token for the first state of every segment but the first, where C come in; nothing else moves."""
    model = blocks(6)
    want = step(model, model, inputs())
    kept = {}
    for length in (1, 6, "auto"):
        run = compiled(model, length)
        kept[length] = saved(model, run)
        assert worst(step(model, run, inputs()), want) <= 1e-3
    least = kept[6]
    assert {k: (v - least) / UNIT for k, v in kept.items()} == {1: 5 * N, 6: 0, "auto": 2 * N}
    # Beside the states: every block's output, what its norm and linear need, and x twice, before and after the first.
    assert least < 30 * UNIT and kept["auto"] < 0.5 * saved(model, compiled(model, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)), ids=str)
def test_aten_is_recomputed_as_operators_are(dtype: torch.dtype) -> None:
    """fp64 has no kernels: there the joint graph holds aten. The same states are kept, the numbers are the same."""
    model, x = blocks(2).to(dtype), inputs(dtype=dtype)
    want = step(model, model, x)
    kept = []
    for length in (1, 2):
        run = compiled(model, length)
        kept.append(sum(t.numel() == N * UNIT for t in run(x).grad_fn.saved_tensors))
        assert worst(step(model, run, x), want) <= (1e-3 if dtype is torch.float32 else 1e-10)
    assert kept == [1, 0], "states"


# -- what must not change --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_changed_option_gets_no_stale_graph() -> None:
    """With norms on the trunk nothing comes apart: the graph of Dynamo is the same for every length."""
    model = blocks(4, trunk=nn.LayerNorm)
    kept = [saved(model, compiled(model, length)) for length in (4, 1, 4)]
    assert kept[1] - kept[0] == 3 * N * UNIT and kept[2] == kept[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "on_the_trunk", (pytest.param(False, marks=pytest.mark.long), True), ids=("in the blocks", "on the trunk")
)
def test_dropout_has_the_same_mask_again(on_the_trunk: bool) -> None:
    model = blocks(4, dropout=0.3)
    for block in model.layers if on_the_trunk else ():
        block.trunk, block.dropout = nn.Dropout(0.3), nn.Identity()
    x, results = inputs(), []
    for length in (None, 4):
        run = compiled(model, length)
        torch.manual_seed(3)
        results.append(step(model, run, x))
    assert worst(results[1], results[0]) <= 1e-3
    torch.manual_seed(4)
    assert worst(step(model, run, x), results[0]) > 0.1, "there is no dropout"


@pytest.mark.slow
def test_beside_the_users_own_checkpoints_and_passes() -> None:
    """A region of theirs in a block stays theirs, and so does their pass on the joint graph."""
    model = blocks(4)
    want = step(model, model, inputs())
    layer = model.layers[0].a
    plain = layer.forward
    layer.forward = lambda x: torch.utils.checkpoint.checkpoint(
        lambda y: plain(y.tanh().atanh()), x, use_reentrant=False
    )
    calls: list[Any] = []
    run = compiled(model, 2, joint_custom_pre_pass=calls.append)
    assert worst(step(model, run, inputs()), want) <= 1e-3 and calls


# What a forward notes on modules, here the account of the streams, need not be noted again in backward.
NOT_REPLAYED = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


class Checkpointed(Stack):
    """Every layer under the user's own checkpoint, once they say so."""

    checkpointing = False

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return self.norm(x)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", (None, pytest.param(2, marks=pytest.mark.long)))
@NOT_REPLAYED
def test_layers_that_the_user_checkpoints(recompute: int | None) -> None:
    torch.manual_seed(0)
    model = mhcify(Checkpointed([Block(nn.Identity()) for _ in range(2)]), (inputs(),))
    perturb(model)
    want = step(model, model, inputs())
    model.checkpointing = True
    run = compiled(model, recompute)
    assert worst(step(model, run, inputs()), want) <= 1e-3
    assert saved(model, run) < saved(model, compiled(blocks(4), recompute))


@pytest.mark.slow
@NOT_REPLAYED
@pytest.mark.long
def test_transformers_gradient_checkpointing() -> None:
    family = BY_NAME["GPT-2"]
    args, kwargs = family.arguments(torch.float32)
    results = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = family.model(torch.float32)
        mhcify(model, family.example(torch.float32))
        perturb(model)
        model.eval().requires_grad_()
        if checkpointing:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = mhc_rewrite.compile(model, options={"recompute": 2}) if checkpointing else model
        out = output(run(*args, **kwargs, use_cache=False))
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert worst(results[1], results[0]) <= 1e-3
