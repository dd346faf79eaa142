"""Random residual programs: what was planted is found, and the perturbed model equals a direct n-stream evaluation.

A failing program is printed with its source; with SHRINK=1 in the environment, a small one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mhc_rewrite import mhcify, plan, report
from mhc_rewrite.plans import RewritePlan
from oracle import Params, perturb, site_params
from program_ops import DECOYS, MIXERS, TAILS
from program_streams import Cell, Evaluator
from program_tree import READ, Body, Expr, Lift, Site, Sum
from programs import FIRST_TRUNKS, KINDS, LATER_TRUNKS, LIFTS, REGIONS, Program, inputs, programs

TOLERANCE = 1e-9
PRESERVE = 1e-10
EXAMPLES, MOST = 30, 110  # of each kind, with repetitions: in `make test`, and in `make test-long`
DIFFERENT = 0.65  # of them, at least
# Shrinking a failing program takes minutes: it is done on demand.
PHASES = tuple(phase for phase in Phase if phase is not Phase.shrink or "SHRINK" in os.environ)
COMMON = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
STREAMS = st.sampled_from((2, 3, 4))
Key = tuple[str, int]


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest element of what was wanted."""
    assert [t.shape for t in got] == [t.shape for t in want]
    scale = max(float(t.abs().max()) for t in want)
    return max(float((a - b).abs().max()) for a, b in zip(got, want)) / max(scale, 1e-300)


def check_sites(program: Program, plan: RewritePlan) -> dict[Key, str]:
    """The sites found are those planted, in order and by source line, in the streams planted. The name of each."""
    wanted = [sorted(run.lines) for run in program.kept]
    lines = [site.source.line for site in plan.sites]
    message = f"planted at lines {wanted}, found at {lines}"
    assert len(lines) == len(wanted), message
    assert all(line in choice for line, choice in zip(lines, wanted)), message
    assert {site.source.file for site in plan.sites} == {program.filename}
    # A layer that is called twice is in its stream twice.
    planted = {run.stream: run.length for run in program.planted if run.length >= 2}
    lengths = [len(stream.sites) for stream in plan.streams]
    assert lengths == list(planted.values()), f"planted streams of {list(planted.values())} sites, found {lengths}"
    assert len({site.name for site in plan.sites}) == len(wanted)
    return {run.key: site.name for run, site in zip(program.kept, plan.sites)}


def run(model: nn.Module | Evaluator, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of x, e and the sites' parameters under fixed cotangents."""
    x, e, mask = inputs()
    x.requires_grad_()
    e.requires_grad_()
    outputs = as_tuple(model(x, e, mask))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    leaves = [x, e, *parameters]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [out.detach() for out in outputs], list(gradients)


def check_numbers(program: Program, n: int, evaluator: type[Evaluator] = Evaluator) -> None:
    """At initialisation the function is kept; perturbed it is that of the direct evaluation, with its gradients."""
    model = program.build()
    assert mhcify(model, inputs(), n_streams=n) is model
    names = check_sites(program, report(model).plan)

    plain = Evaluator(program, program.build(), None, n)
    with torch.no_grad():
        start = plain(*inputs())
        error = distance(as_tuple(model(*inputs())), start)
    assert error <= PRESERVE, f"outputs at initialisation differ by {error:.1e}"

    perturb(model)
    own = dict(model.named_parameters())
    parameters = [tensor for name in names.values() for tensor in site_params(own, name)]
    outputs, gradients = run(model, parameters)

    leaves = {key: Params(*(t.detach().clone().requires_grad_() for t in site_params(own, name)))
              for key, name in names.items()}  # fmt: skip
    direct = evaluator(program, program.build(), leaves, n)
    wanted, wanted_gradients = run(direct, [tensor for params in leaves.values() for tensor in params])
    error = distance(outputs, wanted)
    assert error <= TOLERANCE, f"outputs differ by {error:.1e}"
    error = distance(gradients, wanted_gradients)
    assert error <= TOLERANCE, f"gradients differ by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(MOST, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_programs(kind: str, examples: int) -> None:
    passed: set[str] = set()

    @settings(COMMON, max_examples=examples)
    @given(programs(kind), STREAMS)
    def check(program: Program, n: int) -> None:
        if program.source not in passed:
            check_numbers(program, n)
            passed.add(program.source)

    check()
    assert len(passed) >= DIFFERENT * examples, f"only {len(passed)} different programs were drawn"


def start_parameters(program: Program, n: int) -> dict[Key, Params]:
    """`init="near_identity"`: on equal streams every site computes the ordinary residual add."""
    sites = {}
    for run in program.planted:
        index = run.place
        pre = torch.full((n,), 0.1 / (n - 1), dtype=torch.float64)
        pre[index % n] = 0.9
        res = torch.full((n, n), -8.0, dtype=torch.float64).fill_diagonal_(0.0)
        bias = torch.cat([torch.logit(pre), torch.zeros(n, dtype=torch.float64), res.flatten()])
        alpha = torch.full((3,), 0.01, dtype=torch.float64)
        sites.setdefault(run.key, Params(bias.new_zeros(n * 8, n * n + 2 * n), alpha, bias))
    return sites


@pytest.mark.parametrize("kind", KINDS)
@settings(COMMON, max_examples=20)
@given(data=st.data())
def test_text_and_tree_say_the_same(kind: str, data: st.DataObject) -> None:
    """The generator itself: Python runs the text as the tree is evaluated, on one stream and on n equal ones."""
    program, n = data.draw(programs(kind)), data.draw(STREAMS)
    with torch.no_grad():
        wanted = as_tuple(program.build()(*inputs()))
        given = inputs()
        program.build()(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, inputs())), "the caller's input was changed"
        assert distance(Evaluator(program, program.build(), None, n)(*inputs()), wanted) <= PRESERVE
        sites = start_parameters(program, n)
        assert distance(Evaluator(program, program.build(), sites, n)(*inputs()), wanted) <= PRESERVE


@pytest.mark.slow
def test_every_feature_is_drawn() -> None:
    """What the generator is for does occur in the programs that are tried."""
    seen: set[str] = set()
    for kind in KINDS:

        @settings(COMMON, max_examples=MOST // 2)
        @given(programs(kind))
        def collect(program: Program) -> None:
            seen.update(program.features)
            assert 2 <= len(program.kept)

        collect()
    wanted = {"alias", "aux", "aux alias", "boundary", "fused lift", "alpha on the trunk", "3 branches"}
    wanted |= {"naming inline", "naming named", "naming overwrite"}
    wanted |= {f"form {form}" for form in ("rebind", "iadd", "add_", "branch_iadd", "child")}
    wanted |= {f"layers {what}" for what in ("loop", "tuple", "sequential", "inline", "between", "collect")}
    wanted |= {f"branch {op}" for op in (*MIXERS, *DECOYS, *TAILS, "parallel")}
    wanted |= {f"trunk {op}" for op in (*FIRST_TRUNKS, *LATER_TRUNKS)} | {f"lift {op}" for op in LIFTS}
    wanted |= {f"lift {op}" for region in REGIONS for op in region}
    assert wanted <= seen, wanted - seen


def three_sites() -> Program:
    """x = 1.7 * x + f(x), relu, x = x + 0.5 * (f(x) + g(x)), relu, x += f(x)."""
    root = Body("Model")
    items: list[object] = [Lift(root.expr("linear", READ))]
    items.append(Site((root.expr("linear", READ),), root.expr("times", READ), Sum("+", 0, 1)))
    items.append(Lift(root.expr("relu", READ)))
    pair = (root.expr("mlp", root.expr("norm", READ)), root.expr("matmul", READ))
    items.append(Site(pair, READ, Sum("torch.add", 0, Sum("+", 2, 1), alpha=0.5)))
    items.append(Lift(root.expr("relu", READ)))
    items.append(Site((root.expr("linear", READ),), READ, 1, form="iadd"))
    root.items = items
    return Program(root)


class TransposedResidual(Evaluator):
    """H_res[in, out]."""

    def write(self, site: Site, module: nn.Module, X: list[Tensor], params: Params) -> list[Tensor]:
        order = torch.arange(self.n * self.n).view(self.n, self.n).T.flatten()
        columns = torch.cat([torch.arange(2 * self.n), 2 * self.n + order])
        turned = params._replace(phi=params.phi[:, columns], bias=params.bias[columns])
        return super().write(site, module, X, turned)


class CollapsedBetweenSites(Evaluator):
    """Every site's streams are averaged and expanded again."""

    def write(self, site: Site, module: nn.Module, X: list[Tensor], params: Params) -> list[Tensor]:
        return [Cell(super().write(site, module, X, params)).mean] * self.n


class MeanReading(Evaluator):
    """The block reads the mean of the streams."""

    def branch(self, site: Site, module: nn.Module, u: Tensor) -> Tensor:
        return super().branch(site, module, self.seen)

    def write(self, site: Site, module: nn.Module, X: list[Tensor], params: Params) -> list[Tensor]:
        self.seen = Cell(X).mean
        return super().write(site, module, X, params)


class FirstStreamLifted(Evaluator):
    """An operation on the trunk acts on one stream only."""

    def lift(self, expr: Expr, module: nn.Module, cell: Cell) -> Cell:
        return Cell([*super().lift(expr, module, Cell(cell.streams[:1])).streams, *cell.streams[1:]])


class TrunkFactorLost(Evaluator):
    """t(x) beside the branch is x."""

    def trunk(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        return x


class SitesSwapped(Evaluator):
    """Each site uses the parameters of another."""

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        assert self.sites is not None
        self.sites = dict(zip(self.sites, reversed(self.sites.values())))
        return super().__call__(*args)


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize(
    "evaluator",
    (TransposedResidual, CollapsedBetweenSites, MeanReading, FirstStreamLifted, TrunkFactorLost, SitesSwapped),
)
def test_another_evaluation_is_told_apart(evaluator: type[Evaluator], n: int) -> None:
    program = three_sites()
    check_numbers(program, n)
    with pytest.raises(AssertionError, match="differ by"):
        check_numbers(program, n, evaluator)


def test_other_sites_are_told_apart() -> None:
    program = three_sites()
    found = plan(program.build(), inputs())
    check_sites(program, found)
    (stream,) = found.streams
    a, b, c = stream.sites
    moved = dataclasses.replace(b, source=a.source)
    for wrong in ((a, b), (c, b, a), (a, b, c, a), (a, moved, c)):
        streams = (dataclasses.replace(stream, sites=wrong),)
        with pytest.raises(AssertionError, match="planted"):
            check_sites(program, dataclasses.replace(found, streams=streams))
    split = (dataclasses.replace(stream, sites=(a, b)), dataclasses.replace(stream, sites=(c,)))
    with pytest.raises(AssertionError, match="planted streams"):
        check_sites(program, dataclasses.replace(found, streams=split))
