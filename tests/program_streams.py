"""A random residual program evaluated directly: every planted add on n streams, or on one, from the specification."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oracle import Params, mhc_coefficients
from program_ops import OPS, SAME_TENSOR, Held, linear
from program_tree import Aux, Body, Boundary, Expr, Layers, Lift, Site
from programs import Program


class Cell:
    """What names of the trunk refer to: n tensors, or one. Two names of one cell see each other's in-place adds."""

    def __init__(self, streams: list[Tensor]) -> None:
        self.streams = streams

    @property
    def mean(self) -> Tensor:
        return sum(self.streams[1:], self.streams[0]) / len(self.streams)


class Evaluator:
    """A program on n streams, from the specification.

    Args:
        program: the program.
        model: an unconverted model of it.
        sites: key of a planted site -> its parameters; None evaluates the ordinary program.
        n: number of streams.
    """

    def __init__(
        self, program: Program, model: nn.Module, sites: Mapping[tuple[str, int], Params] | None, n: int
    ) -> None:
        self.program, self.model, self.sites, self.n = program, model, sites, n

    def __call__(self, x: Tensor, e: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        self.e, self.mask = e, mask
        self.todo = iter(self.program.planted)
        self.extra: list[Cell] = []
        cell = self.run(self.program.root, self.model, Cell([x]))
        return (cell.mean, *(extra.mean for extra in self.extra))

    def value(self, expr: Expr, module: nn.Module, x: Tensor) -> Tensor:
        if expr.op == "read":
            return x
        held = Held(getattr(module, name) for name in expr.attributes)
        held.e, held.mask = self.e, self.mask
        return OPS[expr.op].value(held, *(self.value(arg, module, x) for arg in expr.args))

    def run(self, body: Body, module: nn.Module, cell: Cell) -> Cell:
        for item in body.items:
            if isinstance(item, Site):
                cell = self.site(item, module, cell)
            elif isinstance(item, Lift):
                cell = self.lift(item.expr, module, cell)
            elif isinstance(item, Boundary):
                x = cell.mean
                cell = Cell([self.value(item.d, module, x) + self.value(item.f, module, x)])
            elif isinstance(item, Aux):
                read = cell if item.probe is None else Cell([self.value(item.probe, module, cell.mean)])
                self.extra.append(read)
            elif isinstance(item, Layers):
                cell = self.layers(item, module, cell)
        return cell

    def layers(self, item: Layers, module: nn.Module, cell: Cell) -> Cell:
        called = [layer for layer in module.layers if not isinstance(layer, nn.ReLU)]
        if item.style != "sequential":
            called = [called[call] for call in item.calls]
        for position, (call, layer) in enumerate(zip(item.calls, called)):
            if item.collect == position:
                self.extra.append(cell)
            cell = self.run(item.bodies[item.made_of[call]], layer, cell)
            if item.between is not None:
                cell = self.lift(item.between, module, cell)
        return cell

    def lift(self, expr: Expr, module: nn.Module, cell: Cell) -> Cell:
        streams = [self.value(expr, module, x) for x in cell.streams]
        if set(expr.ops()) & {"relu_", *SAME_TENSOR}:
            cell.streams = streams
            return cell
        return Cell(streams)

    def site(self, site: Site, module: nn.Module, cell: Cell) -> Cell:
        run = next(self.todo)
        if self.sites is None or run.length < 2:
            streams = [self.trunk(site, module, cell.mean) + self.branch(site, module, cell.mean)]
        else:
            streams = cell.streams * self.n if run.place == 0 else cell.streams
            streams = self.write(site, module, streams, self.sites[run.key])
            if run.place == run.length - 1:
                streams = [Cell(streams).mean]
        if site.form == "child":
            child = getattr(module, site.child)
            if child.norm is not None:
                streams = [child.norm(x) for x in streams]
        if site.in_place:
            cell.streams = streams
            return cell
        return Cell(streams)

    def trunk(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        return site.factors()[0] * self.value(site.trunk, module, x)

    def branch(self, site: Site, module: nn.Module, u: Tensor) -> Tensor:
        factors = site.factors()
        terms = [factors[k] * self.value(expr, module, u) for k, expr in enumerate(site.branches, start=1)]
        y = sum(terms[1:], terms[0])
        return linear(getattr(module, site.child).dense, y) if site.form == "child" else y

    def write(self, site: Site, module: nn.Module, X: list[Tensor], params: Params) -> list[Tensor]:
        """X'[i] = sum_j H_res[i, j] t(X[j]) + H_post[i] F(sum_j H_pre[j] X[j])."""
        H_pre, H_post, H_res = mhc_coefficients(params, torch.stack(X, dim=-2), 1e-6)
        streams = range(self.n)
        u = sum(H_pre[..., j, None] * X[j] for j in streams)
        y = self.branch(site, module, u)
        kept = [self.trunk(site, module, x) for x in X]
        return [sum(H_res[..., i, j, None] * kept[j] for j in streams) + H_post[..., i, None] * y for i in streams]
