"""What tests/test_distributed_tensor.py runs in every one of its processes: tensor and sequence parallelism.

A decoder in the form of torchtitan's: heads and MLPs are sharded, and between those regions every rank has a part of
the tokens, as plain tensors (`local`) or as DTensors. All is compared with one process, sites far from their start.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from mhc_rewrite import HyperConnection, MHCConfig, load_sites, mhcify, save_sites
from mhc_rewrite.distributed import SiteParallel, check_sites, shard_sites
from mhc_rewrite.torch_private import optimizers_sum_shares
from oracle import perturb
from rank_cases import agree, gradients, refused, sites_of, whole

VOCABULARY, WIDTH, HEADS, LAYERS = 24, 16, 4, 4
CLOSE = 1e-4
WHOLE = SiteParallel(sequence_sharded=False)


# -- the model and its plans -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """What stands behind the streams is called by the root, as the layers are."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))


def original(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    return Decoder(layers)


@functools.cache
def _converted(layers: int, **options: Any) -> Any:
    model = mhcify(original(layers), (tokens(),), **options)
    perturb(model)
    return model


def converted(layers: int = LAYERS, **options: Any) -> Any:
    return copy.deepcopy(_converted(layers, **options))


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def tensor_parallel() -> dict[str, Any]:
    column, row = ColwiseParallel(), RowwiseParallel()
    inside = {"attn.q": column, "attn.k": column, "attn.v": column, "attn.out": row, "mlp.up": column, "mlp.down": row}
    return {f"layers.*.{name}": style for name, style in inside.items()}


EMBED = functools.partial(RowwiseParallel, input_layouts=Replicate())


def sequence_parallel(local: bool, embed: Any = EMBED) -> dict[str, Any]:
    """`local`: whether what the regions hand on are plain tensors. `embed`: the style of the embedding."""
    row = RowwiseParallel(output_layouts=Shard(1), use_local_output=local)
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    more = {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "attn": gather, "mlp": gather}
    return {
        **tensor_parallel(),
        **{f"layers.*.{name}": style for name, style in {**more, "attn.out": row, "mlp.down": row}.items()},
        "embed": embed(output_layouts=Shard(1), use_local_output=local),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def spread(model: Any, local: bool = True, **more: Any) -> Any:
    return parallelize_module(model, mesh(), {**sequence_parallel(local, **more), "": SiteParallel()})


def loss(model: nn.Module, seed: int = 1) -> Tensor:
    return F.cross_entropy(model(tokens(seed)).flatten(0, 1), tokens(seed + 100).flatten())


def run(model: nn.Module, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    value = loss(model, seed)
    value.backward()
    return value.detach(), gradients(model)


def as_in_one(model: nn.Module, want: tuple[Tensor, dict[str, Tensor]]) -> None:
    got = run(model)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    agree(got[1], want[1], CLOSE)
    check_sites(model)


def collectives(model: nn.Module) -> dict[str, int]:
    loss(model).backward()
    with CommDebugMode() as seen:
        loss(model).backward()
    return {str(kind).rpartition(".")[2]: count for kind, count in seen.get_comm_counts().items()}


# -- the decoder -------------------------------------------------------------------------------------------------------


def train(model: Any, run_model: Any = None, steps: int = 3) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Of each step the loss, the gradients and their norm."""
    # Without a large eps, steps go by the sign of what rounds to zero.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, foreach=True)
    for seed in range(steps):
        optimizer.zero_grad()
        value, found = run(model if run_model is None else run_model, seed)
        named = dict(zip((name for name, _ in model.named_parameters()), found.values(), strict=True))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5 * SMALLEST)
        optimizer.step()
        yield value, named, whole(norm).detach()


SMALLEST = 1.0  # of the gradients' norms, so that all are clipped


def same_training(model: Any, run_model: Any = None, **options: Any) -> None:
    alone = converted(**options)
    for step, (got, want) in enumerate(zip(train(model, run_model), train(alone), strict=True)):
        assert want[2] > SMALLEST, want[2]
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[2], want[2], rtol=CLOSE, atol=0)
        agree(got[1], want[1], CLOSE * (1 + step))
        check_sites(model)
    values = {name: whole(p).detach() for name, p in model.named_parameters()}
    agree(values, {name: p.detach() for name, p in alone.named_parameters()}, CLOSE)


def trains() -> None:
    for local in (True, False):
        same_training(spread(converted(), local))


# Torch can neither trace an embedding that is spread by rows nor differentiate compiled layers behind it.


def trains_in_compiled_layers() -> None:
    for local in (True, False):
        model = spread(converted(1), local, embed=ColwiseParallel)
        for layer in model.layers:
            layer.compile(backend="aot_eager")
        same_training(model, layers=1)
        torch._dynamo.reset()


def trains_compiled(backend: str = "aot_eager") -> None:
    for local in (True, False):
        model = spread(converted(2), local, embed=ColwiseParallel)
        same_training(model, torch.compile(model, backend=backend), layers=2)
        torch._dynamo.reset()


def trains_by_inductor() -> None:
    trains_compiled("inductor")


def trains_by_mhc() -> None:
    trains_compiled("mhc")


def counts() -> None:
    """As many collectives as in the unconverted model."""
    alone = parallelize_module(original(), mesh(), tensor_parallel())
    plans: list[dict[str, Any]] = [tensor_parallel(), {**tensor_parallel(), "": WHOLE}]
    assert collectives(alone) == {"all_reduce": 24}
    for plan in plans:
        assert collectives(parallelize_module(converted(), mesh(), plan)) == {"all_reduce": 24}
    for local in (True, False):
        alone = parallelize_module(original(), mesh(), sequence_parallel(local))
        found = collectives(spread(converted(), local))
        assert optimizers_sum_shares() or found.pop("all_reduce") == 3 * 2 * LAYERS
        assert found == collectives(alone)
        assert sorted(collectives(alone).values()) == [18, 19]


def tensor_parallel_alone() -> None:
    """Every rank has all tokens: sites as they are, or DTensors."""
    want = run(converted())
    for styles in ({}, {"": WHOLE}, {"layers.*.mhc_*": WHOLE}):
        as_in_one(parallelize_module(converted(), mesh(), {**tensor_parallel(), **styles}), want)


def wrong_gradients_are_found() -> None:
    """What a site can't see."""
    model = parallelize_module(converted(2), mesh(), sequence_parallel(True))
    run(model)
    refused(lambda: check_sites(model), "the gradient of layers.0.mhc_0.phi differs", "SiteParallel() of mhc_rewrite")
    model = parallelize_module(converted(2), mesh(), {**sequence_parallel(True), "": WHOLE})
    run(model)
    refused(lambda: check_sites(model), "the gradient of layers.0.mhc_0.phi differs", "SiteParallel() of mhc_rewrite")
    if not optimizers_sum_shares():  # they are summed by then
        return
    model = parallelize_module(converted(2), mesh(), {**tensor_parallel(), "": SiteParallel()})
    run(model)
    refused(lambda: check_sites(model), "mhc_0.phi is to be summed over ranks that all", "sequence_sharded=False")


def wrong_use_is_refused() -> None:
    refused(lambda: parallelize_module(original(2), mesh(), SiteParallel()), "Decoder without sites", "Convert")
    refused(lambda: parallelize_module(converted(2), mesh(), {"layers.*.mlp": WHOLE}), "MLP without sites")
    ranks = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    refused(lambda: SiteParallel()._apply(converted(2), ranks), "mesh of 2 dimensions", 'mesh["tp"]')
    model = spread(converted(2))
    refused(lambda: parallelize_module(model, mesh(), WHOLE), "'layers.0.mhc_0.phi'", "distributed already")
    sharded = shard_sites(converted(2))
    refused(lambda: parallelize_module(sharded, mesh(), WHOLE), "before fully_shard")
    alone = parallelize_module(converted(2), mesh(), sequence_parallel(False))
    refused(lambda: alone(tokens()), "are DTensors, and its parameters are not", "SiteParallel")
    site = HyperConnection(WIDTH, MHCConfig())
    for name, p in list(site.named_parameters()):
        site.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh(), [Replicate()])))
    streams = torch.randn(2, 4, WIDTH)
    refused(lambda: site.pre(streams), "plain tensors", "are DTensors", "SiteParallel")


# -- what goes on working ----------------------------------------------------------------------------------------------


def sites_keep_their_ways() -> None:
    """Starting anew, saving and loading, dtypes, copies, recomputation."""
    want = run(converted())
    for length in (1, 4, "auto"):
        for local in (True, False):
            as_in_one(spread(converted(recompute=length), local), want)
    model = spread(converted())
    as_in_one(copy.deepcopy(model), want)
    with tempfile.TemporaryDirectory() as folder:
        save_sites(model, folder)
        other = spread(mhcify(original(), (tokens(),)))
        load_sites(other, folder)
        as_in_one(other, want)
        load_sites(original(), folder)
        empty = spread(mhcify(original(), (tokens(),)))
        empty.load_state_dict(other.state_dict())
        as_in_one(empty, want)
    half = spread(converted()).to(torch.bfloat16)
    assert {p.dtype for site in sites_of(half) for p in site.parameters()} == {torch.float32}
    agree(run(half)[1], run(converted().to(torch.bfloat16))[1], 0.1)
    started = mhcify(original(), (tokens(),), init="equal")
    values = [p.detach().clone() for site in sites_of(started) for p in site.parameters()]
    spread(started.to("meta")).to_empty(device="cpu")
    for site in sites_of(started):
        site.reset_parameters()
        assert not site.has_learned()
    for p, q in zip([p for site in sites_of(started) for p in site.parameters()], values, strict=True):
        assert isinstance(p, DTensor) and torch.equal(whole(p), q)


def with_fsdp(*parts: int) -> None:
    """Each in its own dimension of a mesh; `parts`: over how many ranks tokens are spread."""
    world = dist.get_world_size()
    for tensor in parts or (world, 1):
        ranks = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
        together = converted()
        values = [loss(together, seed) for seed in range(world // tensor)]
        torch.stack(values).mean().backward()
        want = gradients(together)
        for local, alone in ((True, False), (False, False), (True, True)):
            model = converted(recompute=4 if local else None)
            parallelize_module(model, ranks["tensor"], {**sequence_parallel(local), "": SiteParallel()})
            if alone:
                shard_sites(model, ranks["data"])
            for part in (*model.layers, model):
                fully_shard(part, mesh=ranks["data"])
            mine = ranks["data"].get_local_rank()
            for _ in range(2):
                model.zero_grad()
                value, got = run(model, mine)
                torch.testing.assert_close(value, values[mine].detach(), rtol=1e-5, atol=0)
                agree(got, want, CLOSE)
                check_sites(model)
            kinds = {p.grad.placements for site in sites_of(model) for p in site.parameters()}
            assert {kind[1:] for kind in kinds} == {(Replicate(),)}, kinds


def in_two_dimensions() -> None:
    with_fsdp(2)


def others_see_the_trunk() -> None:
    """Hooks, checkpoints, hidden states: of streams that are DTensors everybody sees the mean, a DTensor too. Backward
    hooks of modules see this rank's part of its gradient."""
    want = run(converted())
    first: dict[str, Tensor] = {}
    for local in (None, False, True):
        model = converted() if local is None else spread(converted(), local)
        found: dict[str, Tensor] = {}

        def keep(name: str, value: Any, local: bool | None = local, found: dict[str, Tensor] = found) -> None:
            assert isinstance(value, DTensor) == (local is False and name != "backward hook"), (name, local)
            value = value.detach().clone()
            if local is not None and not isinstance(value, DTensor):
                value = DTensor.from_local(value, mesh(), [Shard(1)])
            found[name] = whole(value)

        def forward(layer: Any, args: Any, out: Any, keep: Any = keep) -> None:
            keep("hidden", out + 0)
            keep("square", (out * out).to(torch.float64))
            out.register_hook(lambda gradient: keep("gradient", gradient))

        model.layers[1].register_forward_hook(forward)
        model.layers[2].register_full_backward_hook(lambda layer, into, out, keep=keep: keep("backward hook", out[0]))
        agree(run(model)[1], want[1], CLOSE)
        assert len(found) == 4, list(found)
        first = first or found
        agree(found, first, CLOSE)
    for reentrant in (True, False):
        for local in (True, False):
            model = spread(converted(), local)
            for layer in model.layers:
                inner = layer.forward
                layer.forward = functools.partial(checkpoint, inner, use_reentrant=reentrant)
            as_in_one(model, want)
