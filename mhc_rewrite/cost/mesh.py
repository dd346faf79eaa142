"""What ranks send one another in a training step, with and without mHC, as formulas and as numbers.

Collectives run in rings: of N ranks that gather or reduce, each sends (N - 1)/N of the data and receives as much; an
all-reduce is the two in turn. A stage of a pipeline that lies between two others receives as much as it sends, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor

from mhc_rewrite.cost.formulas import FP32, SYMBOLS, C, Cost, L, M, Stream, T, n, s
from mhc_rewrite.errors import ConfigError

D, F, N, p, m, g, P, s_w, s_g = sympy.symbols("D F N p m g P s_w s_g", positive=True, integer=True)
h = sympy.symbols("h", nonnegative=True, integer=True)
MESH_SYMBOLS = {
    **{symbol: SYMBOLS[symbol] for symbol in (C, n, L, M, s)},
    T: "tokens of a microbatch", D: "replicas (dp)", F: "shards (fsdp)", N: "ranks of a block (tp or sp)",
    p: "ranks of a pipeline (pp)", m: "microbatches of a step", g: "gatherings of a step",
    h: "messages that a rank sends for a microbatch",
    P: "elements of the model's own parameters, each padded until F divides its first axis",
    s_w: "bytes of an element that is gathered", s_g: "of one that is reduced",
}  # fmt: skip
FORM = "A mesh is written as its axes with their ranks, as in fsdp=64,pp=8"


@dataclass(frozen=True)
class Mesh:
    """How many ranks each way of parallel training takes; all of them together are the product.

    Attributes:
        dp: replicas, whose gradients DDP adds up, or HSDP those of each shard.
        fsdp: shards of FSDP.
        tp: ranks of tensor parallelism, by Megatron's scheme: one all-reduce behind each block, one before it backward.
        sp: the same with the tokens spread over these ranks between blocks; instead of tp.
        pp: ranks of a pipeline.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    sp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis, ranks in dataclasses.asdict(self).items():
            if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
                raise ConfigError(f"{FORM}: {axis} takes a whole number of ranks from 1 on, not {ranks!r}.")
        if self.tp > 1 and self.sp > 1:
            raise ConfigError(f"sp is tp with the tokens spread out: give one of tp={self.tp} and sp={self.sp}.")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """`fsdp=64,pp=8` -> `Mesh(fsdp=64, pp=8)`.

        Raises:
            ConfigError: it is not written so.
        """
        axes = [field.name for field in dataclasses.fields(cls)]
        ranks: dict[str, int] = {}
        for part in text.split(","):
            axis, _, number = (end.strip() for end in part.partition("="))
            if axis not in axes:
                raise ConfigError(f"{FORM}; {part.strip()!r} of {text!r} names none of {', '.join(axes)}.")
            if axis in ranks:
                raise ConfigError(f"{FORM}; {text!r} has {axis} twice.")
            if not number.isdecimal():
                raise ConfigError(f"{FORM}; in {text!r}, {axis} has no number.")
            ranks[axis] = int(number)
        return cls(**ranks)

    def __str__(self) -> str:
        return ",".join(f"{axis}={ranks}" for axis, ranks in dataclasses.asdict(self).items() if ranks > 1) or "dp=1"

    @property
    def size(self) -> int:
        """Of all ranks."""
        return math.prod(dataclasses.astuple(self))

    @property
    def blocks(self) -> int:
        """N: the ranks that a block is spread over."""
        return self.tp * self.sp


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a training step in one of the ways.

    Attributes:
        weights: for the parameters of the model as it was.
        blocks: for the blocks of a stream of the model as it was, or for its cut.
        sites: what mHC adds to a stream.
        cut: whether of several streams one at a time passes.
    """

    weights: sympy.Expr = sympy.S.Zero
    blocks: sympy.Expr = sympy.S.Zero
    sites: sympy.Expr = sympy.S.Zero
    cut: bool = False


@dataclass(frozen=True)
class MeshCost:
    """Formulas of one plan on a mesh, and its sizes.

    Attributes:
        cost: the plan on one device.
        mesh: the ranks.
        gathered: s_w, of the model's own parameters.
        reduced: s_g, of its gradients.
        sites_apart: the sites are groups of FSDP of their own, in fp32, as by `shard_sites`; else they are parts of
            their layers' groups.
    """

    cost: Cost
    mesh: Mesh
    gathered: int
    reduced: int
    sites_apart: bool

    def __post_init__(self) -> None:
        sites = sum(stream.sites for stream in self.cost.streams)
        if self.mesh.pp > sites:
            raise ConfigError(f"pp={self.mesh.pp} asks for more stages than the model has sites, which are {sites}.")

    @property
    def _weights(self) -> sympy.Expr:
        """Elements of the model's own parameters that a rank would hold without fsdp: all axes divide them evenly."""
        return P / (p * N)

    @property
    def _sites(self) -> sympy.Expr:
        """Elements of a stream's sites on a rank, without fsdp; they are not spread over the ranks of a block.

        FSDP shards the first axis of each parameter, padded until F divides it: nC of phi, 3 of alpha.
        """
        return M / p * sum(F * sympy.ceiling(rows / F) * rest for rows, rest in self.cost.shapes)

    @property
    def _of_sites(self) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
        """g, s_w and s_g of sites. In groups of their own they are kept from forward to backward, in fp32."""
        return (sympy.ceiling(g / 2), sympy.Integer(FP32), sympy.Integer(FP32)) if self.sites_apart else (g, s_w, s_g)

    @property
    def sent(self) -> dict[str, Sent]:
        """By the way it is sent. Expert and context parallelism and the ends of the model are left out.

        - fsdp: parameters are gathered g times, and gradients reduced and scattered once;
        - dp: an all-reduce of the gradients that a rank holds, once;
        - tensor: two all-reduces of a block's (T, C), forward and backward, or with sp two gatherings and two
          scattering reductions, which send as much. The blocks read u and give y, so mHC adds nothing for tokens; with
          sp every rank has gradients of the sites from its tokens alone, and adds them up once;
        - pipeline: h messages for each microbatch: the stream, or its gradient, at a cut.
        """
        gathers, bytes_gathered, bytes_reduced = self._of_sites
        shards, replicas, ring = (F - 1) / F, 2 * (D - 1) / D, (N - 1) / N
        spread = N if self.mesh.sp > 1 else 1
        return {
            "fsdp": Sent(
                weights=shards * (g * s_w + s_g) * self._weights,
                sites=shards * (gathers * bytes_gathered + bytes_reduced) * self._sites,
            ),
            "dp": Sent(
                weights=replicas * s_g * self._weights / F,
                sites=replicas * bytes_reduced * self._sites / F,
            ),
            "tensor": Sent(
                blocks=4 * ring * s * C * T * m * L / p,
                sites=2 * ring * FP32 * self._sites if self.mesh.sp > 1 else sympy.S.Zero,
            ),
            "pipeline": Sent(blocks=m * h * s * C * T / spread, sites=m * h * s * (n - 1) * C * T / spread, cut=True),
        }

    @property
    def after_expansion(self) -> sympy.Expr:
        """Bytes of a message at a cut right behind the expansion, where all streams are equal and one could pass."""
        return s * C * T / (N if self.mesh.sp > 1 else 1)

    @property
    def collectives(self) -> sympy.Expr:
        """That sites in groups of their own add to a step of FSDP: a gathering and a reduction each, by themselves."""
        return M / p * (sympy.ceiling(g / 2) + 1) if self.sites_apart else sympy.S.Zero

    def evaluate(
        self, formula: sympy.Expr, stream: Stream, *, parameters: float = 0, tokens: int = 1, microbatches: int = 1,
        gathers: int | None = None, messages: int = 0,
    ) -> int:  # fmt: skip
        """A formula with the sizes of one stream.

        Args:
            parameters: P, by `padded`.
            tokens: T.
            microbatches: m.
            gathers: g; by default two a microbatch, and one where a pipeline's stages keep what they have gathered.
            messages: h, by `messages`.
        """
        if gathers is None:
            gathers = 2 * microbatches if self.mesh.pp == 1 else 1
        return int(formula.subs({
            **self.cost.sizes(stream, tokens), P: int(parameters), m: microbatches, g: gathers, h: messages,
            D: self.mesh.dp, F: self.mesh.fsdp, N: self.mesh.blocks, p: self.mesh.pp,
            s_w: self.gathered, s_g: self.reduced,
        }))  # fmt: skip

    def bytes(self, way: str, **sizes: Any) -> tuple[int, int]:
        """That a rank sends in a step: as the model was, and converted; the same with n = 1.

        Args:
            way: a key of `sent`.
            sizes: as for `evaluate`.
        """
        sent, streams = self.sent[way], self.cost.streams

        def value(formula: sympy.Expr) -> int:
            values = [self.evaluate(formula, stream, **sizes) for stream in streams]
            return max(values) if sent.cut else sum(values)

        weights = self.evaluate(sent.weights, streams[0], **sizes)
        original = weights + value(sent.blocks)
        return original, original if self.cost.config.n_streams == 1 else weights + value(sent.blocks + sent.sites)

    def message(self, tokens: int) -> tuple[int, int]:
        """Bytes that pass a cut for one microbatch, in one direction: as the model was, and converted."""
        return self.bytes("pipeline", tokens=tokens, messages=1)


def on_mesh(of: Cost, mesh: Mesh, sites_apart: bool | None = None) -> MeshCost:
    """The same on a mesh, parameters and gradients in the streams' dtype.

    Args:
        sites_apart: as in `MeshCost`; by default where that is narrower than the sites', which one group can't hold.
    """
    itemsize = max(stream.itemsize for stream in of.streams)
    return MeshCost(of, mesh, itemsize, itemsize, itemsize < FP32 if sites_apart is None else sites_apart)


def padded(parameters: Iterable[Tensor], shards: int) -> int:
    """P: elements of parameters, each padded as FSDP pads it."""
    return sum(shards * -(-len(p) // shards) * p[0].numel() if p.dim() else shards for p in parameters)


def messages(ranks: Sequence[int]) -> int:
    """h of the rank that sends most, where stage k of a pipeline is on rank `ranks[k]`: forward to the next stage and
    backward to the one before it, unless they are on the same rank."""
    sent = dict.fromkeys(ranks, 0)
    for here, there in itertools.pairwise(ranks):
        if here != there:
            sent[here] += 1
            sent[there] += 1
    return max(sent.values())
