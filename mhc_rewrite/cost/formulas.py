"""What sites cost on one device, as formulas and as numbers: memory traffic, flops, memory.

The traffic of weights is left out, and so are excluded sites. Source: arXiv:2512.24880, tables 2 and 3 and eq. 20; what
is not from there is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sympy

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.connections import CONNECTIONS
from mhc_rewrite.kernels.kinds import KINDS

# Tokens, width, streams, sites of a stream (calls), of which M have parameters of their own, sites of a segment of
# recomputation, bytes of an element, Sinkhorn-Knopp's iterations.
T, C, n, L, M, L_r, s, t_max = sympy.symbols("T C n L M L_r s t_max", positive=True, integer=True)
# Logits of H_res, where the connection is a function.
K_res = sympy.symbols("K_res", nonnegative=True, integer=True)
COLUMNS = {K_res: "logits of H_res"}
# Where n changes within a stream.
n_0, n_1 = sympy.symbols("n_0 n_1", positive=True, integer=True)
RESIZED = {n_0: "streams before they are resized", n_1: "n behind that, and 1 where a stream begins"}
SYMBOLS = {
    T: "tokens", C: "width", n: "streams", L: "sites of a stream", M: "those of them with their own parameters",
    L_r: "sites of a segment", s: "bytes of an element", t_max: "iterations of Sinkhorn-Knopp",
}  # fmt: skip
FUSIONS = ("unfused", "fused", "boundary")
FP32 = 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """What one site moves for one token.

    Attributes:
        read: elements of X, y, u, X' and their gradients, each once a launch.
        written: the same.
        coefficients: fp32 numbers, both ways: H_post, H_res, raw, r and their gradients.
        again: elements that a second launch reads for the gradients of phi, alpha and bias.
    """

    read: sympy.Expr
    written: sympy.Expr
    coefficients: sympy.Expr
    again: sympy.Expr = sympy.S.Zero

    @property
    def elements(self) -> sympy.Expr:
        """Of the streams, but for those read again: what the specification's table counts."""
        return sympy.expand(self.read + self.written)

    @property
    def bytes(self) -> sympy.Expr:
        """All of it."""
        return s * (self.elements + self.again) + FP32 * self.coefficients


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one site for one token; a fused multiply-add is two, what is O(n) is left out.

    Attributes:
        projection: x @ phi and the sum of squares [14, 15], or their gradients.
        mixes: u and X', or their gradients.
        sinkhorn: Sinkhorn-Knopp [9, 19], which backward runs once more before it goes back.
    """

    projection: sympy.Expr
    mixes: sympy.Expr
    sinkhorn: sympy.Expr


@dataclass(frozen=True)
class Kept:
    """What a stream's sites keep from forward to backward, in numbers.

    Attributes:
        states: X at the first site of each segment; that of the first segment is n equal streams, so C a token.
        outputs: y of every block. A block that keeps its input too has it made again, and keeps C a token less for it.
        coefficients: fp32 numbers: raw and r.
        mixes: fp32 numbers: H_post and H_res, which autograd keeps as inputs of `post` where nothing is recomputed.
    """

    states: sympy.Expr
    outputs: sympy.Expr
    coefficients: sympy.Expr
    mixes: sympy.Expr = sympy.S.Zero

    @property
    def bytes(self) -> sympy.Expr:
        """Together."""
        return s * (self.states + self.outputs) + FP32 * (self.coefficients + self.mixes)


@dataclass(frozen=True)
class Stream:
    """The sizes of one residual stream, or of a stretch of one that has n of its own.

    Attributes:
        width: C.
        sites: in the order of their calls, L.
        modules: those with parameters, M.
        itemsize: s.
        n: of a stretch; None where it is that of the config.
        before: how many streams a stretch is resized from; 1 where the stream begins.
    """

    width: int
    sites: int
    modules: int
    itemsize: int
    n: int | None = None
    before: int = 1


@dataclass(frozen=True)
class Cost:
    """Formulas of one plan, and its sizes.

    Attributes:
        config: n, the connection and its iterations.
        streams: sizes, stream by stream.
    """

    config: MHCConfig
    streams: tuple[Stream, ...]

    @property
    def _in_kernels(self) -> bool:
        return self.config.dynamic and self.config.connection in KINDS

    @property
    def _constrained(self) -> bool:
        """Whether every token has its own Sinkhorn-Knopp."""
        return self._in_kernels and KINDS[self.config.connection].constrained

    @property
    def _columns(self) -> sympy.Expr:
        """Coefficients of a site."""
        return 2 * n + (n**2 if self.config.connection in KINDS else K_res)

    @property
    def _raw(self) -> sympy.Expr:
        """raw and r: fp32 numbers of a token and site; hc has a norm for each stream, and without phi r is all."""
        if not self.config.dynamic:
            return sympy.Integer(1)
        return self._columns + (n if self.config.connection == "hc" else 1)

    @property
    def traffic(self) -> dict[str, tuple[Traffic, Traffic]]:
        """Forward and backward for each fusion, a token and site.

        - unfused: every product and every sum of table 2 by itself. Backward the same products, each reading its
          output's gradient and its inputs, and two sums that bring the gradients of X together;
        - fused: `pre` and `post`. Backward, pre's launch takes up the gradient of X that post's has written;
        - boundary: post of a site and pre of the next in one launch, at every site. A stream's first pre and last post
          are no boundary and move (n + 4)C together, not the (2n + 2)C of one. Where the connection is a function, it
          stands between the projection and the sweep over X' that makes u, which reads nC more; backward between that
          sweep's gradient, which reads (n + 2)C more, and the others.
        """
        mix, both = n**2 + n, self._columns
        forth, back = (0, 0) if self._in_kernels else (n * C, (n + 2) * C)
        forward, backward = 2 * mix + self._raw, 3 * mix + self._raw
        return {
            "unfused": (
                Traffic((5 * n + 1) * C, (3 * n + 1) * C, 2 * both),
                Traffic((9 * n + 2) * C, (5 * n + 1) * C, 4 * both),
            ),
            "fused": (
                Traffic((2 * n + 1) * C, (n + 1) * C, forward),
                Traffic((4 * n + 2) * C, (2 * n + 1) * C, backward, n * C),
            ),
            "boundary": (
                Traffic((n + 1) * C + forth, (n + 1) * C, forward),
                Traffic((2 * n + 2) * C + back, (n + 1) * C, backward, (n + 1) * C),
            ),
        }

    @property
    def resize(self) -> tuple[Traffic, Traffic]:
        """Forward and backward where n_0 streams become n between two stretches, a token."""
        zero = sympy.S.Zero
        return Traffic(n_0 * C, n * C, zero), Traffic(n * C, n_0 * C, zero)

    @property
    def _first(self) -> sympy.Expr:
        """How many streams of the first state are kept: of equal ones, as an expansion makes them, one."""
        return n_1 if any(stream.before > 1 for stream in self.streams) else sympy.S.One

    @property
    def flops(self) -> tuple[Flops, Flops]:
        """Forward and backward, a token and site."""
        columns = self._columns if self.config.dynamic else sympy.Integer(0)
        forward = sinkhorn = sympy.Integer(0)
        if self._constrained:
            # exp; then columns and rows in turn: n - 1 sums and n divisions for each of n.
            forward = n**2 + 2 * t_max * n * (2 * n - 1)
            # Of M = A / sum(A): (dM - sum(dM M)) / sum(A), for each of n: n products, n - 1 sums, n differences, n
            # divisions.
            sinkhorn = forward + 2 * t_max * n * (4 * n - 1) + n**2
        return (
            Flops(2 * n * C * (columns + 1), 2 * n * C + 2 * n * (n + 1) * C, forward),
            Flops(2 * n * C * (2 * columns + 1), 4 * n * C + 4 * n * (n + 1) * C, sinkhorn),
        )

    @property
    def shapes(self) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
        """Of phi, alpha and bias of one site: the first axis, by which they are sharded, and what follows it."""
        connection = CONNECTIONS[self.config.connection]
        phi = connection.phi_shape(n, C) if connection.phi_shape else (n * C, self._columns)
        bias = (self._columns, sympy.S.One)
        return (phi, (sympy.Integer(3), sympy.S.One), bias) if self.config.dynamic else (bias,)

    @property
    def parameters(self) -> sympy.Expr:
        """phi, alpha and bias of a stream's sites."""
        return M * sum(rows * rest for rows, rest in self.shapes)

    @property
    def kept(self) -> Kept:
        """By a stream where nothing is recomputed."""
        return Kept(C * T * (n * (L - 1) + self._first), C * T * L, T * L * self._raw, T * L * (n**2 + n))

    @property
    def kept_in_segments(self) -> Kept:
        """By a stream where all that lies between blocks is recomputed, in segments of L_r sites [20]."""
        states = n * (sympy.ceiling(L / L_r) - 1) + self._first
        return Kept(C * T * states, C * T * L, T * L * self._raw)

    @property
    def transient(self) -> sympy.Expr:
        """Elements that backward makes again of one segment: X, u and its norm at each site [20]."""
        return (n + 2) * C * T * L_r

    @property
    def peak(self) -> sympy.Expr:
        """Bytes that a stream adds to the peak memory of a training step where nothing is recomputed.

        The peak is taken to be at the start of backward, as it is where a model has many layers.
        """
        return self.kept.bytes

    @property
    def peak_in_segments(self) -> sympy.Expr:
        """The same where all that lies between blocks is recomputed.

        Of blocks that keep their input, as those do that begin with a norm: it is made again.
        """
        return self.kept_in_segments.bytes + s * (self.transient - C * T * L)

    @property
    def cut(self) -> sympy.Expr:
        """Bytes that pass a pipeline's cut between two sites; after the expansion, before any site, it is 1/n of it."""
        return s * n * C * T

    def evaluate(
        self,
        formula: sympy.Expr,
        *,
        tokens: int = 1,
        segment: int | None = None,
        over: Callable[[Iterable[int]], int] = sum,
    ) -> int:
        """A formula with the sizes of every stream, stretch by stretch; 0 with n = 1, where nothing is rewritten.

        Args:
            tokens: T, the same for all streams.
            segment: L_r, at most the stream's length; the best one if it is left out.
            over: how the streams' numbers become one. Of `transient` and `cut` only one stream's is there at a time:
                `max`.
        """
        if self.config.n_streams == 1:
            return 0
        return over(int(formula.subs(self.sizes(stream, tokens, segment))) for stream in self.streams)

    def sizes(self, stream: Stream, tokens: int = 1, segment: int | None = None) -> dict[sympy.Expr, int]:
        """What the symbols stand for in one stream."""
        streams = stream.n or self.config.n
        return {
            T: tokens, C: stream.width, n: streams, L: stream.sites, M: stream.modules, s: stream.itemsize,
            L_r: min(segment or best_segment(streams, stream.sites), stream.sites),
            t_max: self.config.sinkhorn_iterations, n_0: stream.before, n_1: streams if stream.before > 1 else 1,
            K_res: CONNECTIONS[self.config.connection].columns(streams),
        }  # fmt: skip

    def moved(self, fusion: str, tokens: int = 1) -> tuple[int, int]:
        """Bytes that all sites move, forward and backward, with what it takes to resize streams between stretches.

        Args:
            fusion: a key of `traffic`.
        """
        forward, backward = (
            self.evaluate(T * L * site.bytes, tokens=tokens)
            + sum(int((T * change.bytes).subs(self.sizes(k, tokens))) for k in self.streams if k.before > 1)
            for site, change in zip(self.traffic[fusion], self.resize)
        )
        return forward, backward

    def best_segment(self, stream: int = 0) -> int:
        """L_r of one stream that keeps least, what is made again included."""
        return best_segment(self.streams[stream].n or self.config.n, self.streams[stream].sites)


def best_segment(streams: int, sites: int) -> int:
    """The L_r for which n ceil(L / L_r) + (n + 2) L_r is least [20], of several the shortest.

    Without the rounding up the least is at sqrt(nL / (n + 2)), and the rounded curve lies above the smooth one: out is
    every length at which the smooth one already is above what was found next to its minimum.
    """

    def kept(length: int) -> int:
        return streams * -(-sites // length) + (streams + 2) * length

    root = math.sqrt(streams * sites / (streams + 2))
    middle = min(kept(length) for length in {max(1, math.floor(root)), math.ceil(root)}) / (2 * (streams + 2))
    reach = math.sqrt(max(0.0, middle**2 - root**2))
    return min(range(max(1, math.floor(middle - reach)), min(sites, math.ceil(middle + reach)) + 1), key=kept)
