"""Counts the kernels that a site launches on a GPU, in compiled models; no GPU is needed, see `mocked_gpu`.

`python tests/launches.py` prints two tables: sites, and operators by themselves; `--json` what the tests read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mhc_rewrite import lowering, mhcify
from mhc_rewrite.conversion import roles
from mhc_rewrite.passes.fuse_boundaries import Fused
from mocked_gpu import Launched, counting, launched
from oracle import perturb

WIDTH, SHAPE, N = 768, (2, 1024), 4


class Layer(nn.Module):
    """Two sites whose blocks are a norm and a linear layer, and an activation behind it or not."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.a = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.act(self.a(self.norm1(x)))
        return x + self.act(self.b(self.norm2(x)))


class Model(nn.Module):
    def __init__(self, layers: int, activated: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(F.silu if activated else nn.Identity()) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# -- sites -------------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How sites are compiled.

    Attributes:
        name: in the table.
        precision: "fp32", "bf16", or "autocast" of an fp32 model to bf16.
        fused: whether `post` and `pre` become `boundary`, and the last `post` and the mean `post_collapse`.
        whole: whether the operators stay whole, or become aten for Inductor, as where Triton's kernels don't run.
        activated: whether blocks end in an activation.
        connection: of the conversion.
        recompute: of the backend.
        layers: the two models that are compared.
    """

    name: str
    precision: str = "fp32"
    fused: bool = True
    whole: bool = True
    activated: bool = False
    connection: str = "mhc"
    recompute: int | None = None
    layers: tuple[int, int] = (1, 2)


FORMS = [
    Form("boundaries fused", layers=(2, 3)),
    Form("boundaries fused", "bf16"),
    Form("boundaries fused", "autocast"),
    Form("boundaries fused, blocks end in an activation", activated=True),
    Form("boundaries fused, hc", connection="hc"),
    Form("boundaries fused, kromhc", connection="kromhc"),
    Form("boundaries fused, recompute=2", recompute=2),
    Form("site by site", fused=False),
    Form("boundaries fused, aten", whole=False),
]


class More(NamedTuple):
    """By how much a converted model launches more than the original."""

    launches: float
    own: dict[str, float]
    """Which of them the operators launch, `operator: kernel`."""


class Row(NamedTuple):
    """One training step, forward and backward each: for every further site, and once for the ends of a stream."""

    site: tuple[More, More]
    ends: tuple[More, More]


def row(form: Form) -> Row:
    few, many = (2 * layers for layers in form.layers)
    found = []
    for way in range(2):
        more = {
            sites: _difference(
                _converted(sites // 2, form)[way], _original(sites // 2, form.precision, form.activated)[way]
            )
            for sites in (few, many)
        }
        site = {name: (more[many][name] - more[few][name]) / (many - few) for name in {**more[few], **more[many]}}
        ends = {name: more[few][name] - few * count for name, count in site.items()}
        found.append((_more(site), _more(ends)))
    forward, backward = found
    return Row((forward[0], backward[0]), (forward[1], backward[1]))


def _difference(converted: Counter[str], original: Counter[str]) -> Counter[str]:
    difference = Counter(converted)
    difference.subtract(original)
    return difference


def _more(counts: dict[str, float]) -> More:
    return More(sum(counts.values()), {name: c for name, c in sorted(counts.items()) if c and ": " in name})


@functools.cache
def _original(layers: int, precision: str, activated: bool) -> Launched:
    """What a training step launches."""
    return _step(*_built(layers, precision, activated), precision)


@functools.cache
def _converted(layers: int, form: Form) -> Launched:
    model, x = _built(layers, form.precision, form.activated)
    with contextlib.nullcontext() if form.fused else _apart():
        # Sizes are free: a conversion runs the model a dozen times, for which a few tokens do.
        mhcify(model, (x[:, :4],), n_streams=N, connection=form.connection)
        perturb(model)
        return _step(model, x, form.precision, form.whole, {"recompute": form.recompute})


def _built(layers: int, precision: str, activated: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Model(layers, activated).to(dtype), torch.randn(*SHAPE, WIDTH, dtype=dtype)


def _step(
    model: nn.Module, x: Tensor, precision: str, whole: bool = True, options: dict[str, Any] | None = None
) -> Launched:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        return launched(model, (x,), whole=whole, options=options)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Inside, no operators are fused, neither within a layer nor in the graph."""

    def leave(*args: Any) -> Fused:
        return Fused()

    with mock.patch.object(roles, "fuse_site_calls", leave), mock.patch.object(lowering, "fuse_boundaries", leave):
        yield


# -- operators ---------------------------------------------------------------------------------------------------------


def operators(
    tokens: int = 2048, width: int = 768, streams: int = N, dtype: torch.dtype = torch.bfloat16
) -> dict[str, dict[str, int]]:
    """What each operator launches on contiguous operands; `streams` is 1 where they are still equal."""

    def stream(*shape: int) -> Tensor:
        return torch.empty(tokens, *shape, dtype=dtype, device="meta")

    def number(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    columns = N * N + 2 * N
    state = (stream(streams, width),)
    branch = (*state, stream(width), number(tokens, N), number(tokens, N, N))
    parameters = (number(N * width, columns), number(3), number(columns))
    kept = (number(tokens, columns), number(tokens, 1), 20, "mhc")
    gradients = (stream(width), number(tokens, N), number(tokens, N, N))
    options = (20, "mhc", 1e-6, "")
    calls: dict[str, tuple[Any, ...]] = {
        "pre": (*state, *parameters, *options),
        "post": (*branch, ""),
        "post_collapse": (*branch, ""),
        "boundary": (*branch, *parameters, *options),
        "pre_backward": (*gradients, *state, *parameters, *kept),
        "post_backward": (stream(N, width), *branch),
        "post_collapse_backward": (stream(width), *branch),
        "boundary_backward": (stream(N, width), *gradients, *branch, *parameters, *kept),
    }
    found = {}
    for name, args in calls.items():
        with counting() as counts:
            getattr(torch.ops.mhc_rewrite, name)(*args)
        found[name] = {kernel.removeprefix(f"{name}: "): count for kernel, count in counts.items()}
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def site_table(rows: list[tuple[Form, Row]]) -> Table:
    table = Table("sites", "precision", "forward, a site", "backward, a site", "forward, ends", "backward, ends")
    for form, more in rows:
        counts = [f"{way.launches:g}" for part in more for way in part]
        table.add_row(form.name, form.precision, *counts)
    return table


def operator_table() -> Table:
    table = Table("operator", "launches", "streams still equal")
    each, equal = operators(), operators(streams=1)
    for name in each:
        table.add_row(name, *(_sum(counts[name]) for counts in (each, equal)))
    return table


def _sum(counts: dict[str, int]) -> str:
    parts = [f"{count} {name}" if count > 1 else name for name, count in counts.items()]
    return f"{sum(counts.values())}: {', '.join(parts)}"


if __name__ == "__main__":
    if "--json" in sys.argv:
        print(json.dumps([row(form) for form in FORMS]))
    else:
        console = Console(width=140)
        for table in (site_table([(form, row(form)) for form in FORMS]), operator_table()):
            table.box = box.MARKDOWN
            console.print(table)
