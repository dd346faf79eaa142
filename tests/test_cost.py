"""The cost model: formulas against the specification, against counts made in other ways, and against models."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mhc_rewrite
from mhc_rewrite import HyperConnection, MHCConfig
from mhc_rewrite import cost as costs
from mhc_rewrite.cli import spec
from mhc_rewrite.cost import FUSIONS, C, Cost, Device, L, L_r, M, Stream, T, best_segment, cost, estimate, n, s, t_max
from mhc_rewrite.errors import ConfigError
from test_cli import folder, run  # noqa: F401 (folder is a fixture)

DEMOS = Path(__file__).resolve().parent.parent / "demos"
MHC = Cost(MHCConfig(), (Stream(width=10, sites=12, modules=12, itemsize=4),))


def equal(formula: Any, expected: Any) -> bool:
    return sympy.expand(formula - expected) == 0


def saved_bytes(step: Callable[[], Any], models: Sequence[nn.Module]) -> int:
    """Bytes of what one step keeps from forward to backward, each piece of memory once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


# Traffic -------------------------------------------------------------------------------------------------------------

TABLE = {
    # fusion -> forward read, written, backward read, written; elements of the streams, a token and site
    "unfused": ((5 * n + 1) * C, (3 * n + 1) * C, None, None),
    "fused": ((2 * n + 1) * C, (n + 1) * C, None, None),
    "boundary": ((n + 1) * C, (n + 1) * C, (2 * n + 2) * C, (n + 1) * C),
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_traffic_is_the_specification_s(fusion: str) -> None:
    forward, backward = MHC.traffic[fusion]
    got = (forward.read, forward.written, backward.read, backward.written)
    assert all(expected is None or equal(formula, expected) for formula, expected in zip(got, TABLE[fusion]))


@pytest.mark.parametrize(
    "fusion, forward, backward, symbolic",
    [("unfused", 34, 59, (8 * n + 2) * C), ("fused", 14, 27, (3 * n + 2) * C), ("boundary", 10, 15, (2 * n + 2) * C)],
)
def test_four_streams(fusion: str, forward: int, backward: int, symbolic: sympy.Expr) -> None:
    assert [moved.elements.subs(n, 4) for moved in MHC.traffic[fusion]] == [forward * C, backward * C]
    assert equal(MHC.traffic[fusion][0].elements, symbolic)


def test_unfused_coefficients_are_the_paper_s() -> None:
    """Table 2: n^2 + 2n read and as many written."""
    assert equal(MHC.traffic["unfused"][0].coefficients, 2 * (n**2 + 2 * n))


def test_unfused_backward_is_a_sum_over_products() -> None:
    """One row a product of table 2 (read, written): output gradients and inputs in, gradients of the inputs out."""
    rows = [
        (2 * n, n),  # H_res X: the gradient of X', X; the gradient of X
        (n + 1, 1),  # H_post y: the gradient of X', y; the gradient of y
        (n + 1, n),  # H_pre X: the gradient of u, X; the gradient of X
        (n, n),  # coefficients: X; the gradient of X
        (4 * n, 2 * n),  # three gradients of X added up
    ]
    backward = MHC.traffic["unfused"][1]
    assert equal(backward.read, C * sum(read for read, _ in rows))
    assert equal(backward.written, C * sum(written for _, written in rows))


def test_gradients_of_parameters_read_the_streams_again() -> None:
    """docs/kernels.md: n for the launch after pre's gradient, n + 1 after boundary's; single products need none."""
    again = {fusion: [moved.again for moved in MHC.traffic[fusion]] for fusion in FUSIONS}
    assert again == {"unfused": [0, 0], "fused": [0, n * C], "boundary": [0, (n + 1) * C]}


@pytest.fixture(scope="module")
def bytes_moved() -> Any:
    sys.path.insert(0, str(DEMOS))
    try:
        import gpu_operators

        yield lambda name, size, dtype, backward: gpu_operators.bytes_moved(
            name, gpu_operators.Size(*size), dtype, backward
        )
    finally:
        sys.path.remove(str(DEMOS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("streams", [2, 3, 4, 8])
def test_traffic_is_the_operators(bytes_moved: Callable[..., int], streams: int, dtype: torch.dtype) -> None:
    tokens, width = 5, 24
    size = (tokens, streams, width)
    of = Cost(MHCConfig(n_streams=streams), (Stream(width, 1, 1, dtype.itemsize),))

    def ours(fusion: str) -> list[int]:
        # What the parameters' gradients read again is theirs: gpu_operators leaves it out.
        return [of.evaluate(T * (k.bytes - s * k.again), tokens=tokens) for k in of.traffic[fusion]]

    def operators(*names: str) -> list[int]:
        forward = sum(bytes_moved(name, size, dtype, False) for name in names)
        return [forward, sum(bytes_moved(name, size, dtype, True) for name in names) - forward]

    assert ours("boundary") == operators("boundary")
    forward, backward = operators("pre", "post")
    # In one site the gradient of X that post has written is read by pre, which adds its own.
    assert ours("fused") == [forward, backward + tokens * streams * width * dtype.itemsize]


# Flops ---------------------------------------------------------------------------------------------------------------


class Counted:
    """A number that counts what is done to it."""

    done = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _with(self, other: Counted, value: float) -> Counted:
        Counted.done += 1
        return Counted(value)

    def __add__(self, other: Counted) -> Counted:
        return self._with(other, self.value + other.value)

    def __sub__(self, other: Counted) -> Counted:
        return self._with(other, self.value - other.value)

    def __mul__(self, other: Counted) -> Counted:
        return self._with(other, self.value * other.value)

    def __truediv__(self, other: Counted) -> Counted:
        return self._with(other, self.value / other.value)

    def exp(self) -> Counted:
        return self._with(self, math.exp(self.value))


def total(values: list[Counted]) -> Counted:
    first, *rest = values
    for value in rest:
        first = first + value
    return first


def sinkhorn(logits: list[list[float]], iterations: int) -> tuple[int, int, list[list[float]], list[list[float]]]:
    """[9] and its gradient by hand, for the gradient of sum of squares / 2: operations of both, H_res, gradient."""
    size = len(logits)
    Counted.done = 0
    rows = [[Counted(a).exp() for a in row] for row in logits]
    exponentials, steps = rows, []
    for k in range(2 * iterations):
        lines = [list(line) for line in zip(*rows)] if k % 2 == 0 else rows
        sums = [total(line) for line in lines]
        lines = [[entry / of for entry in line] for line, of in zip(lines, sums)]
        steps.append((lines, sums))
        rows = [list(line) for line in zip(*lines)] if k % 2 == 0 else lines
    result, forward = rows, Counted.done
    gradient = [[Counted(entry.value) for entry in row] for row in rows]
    for k in reversed(range(2 * iterations)):
        lines, sums = steps[k]
        of = [list(line) for line in zip(*gradient)] if k % 2 == 0 else gradient
        inner = [total([g * m for g, m in zip(gs, ms)]) for gs, ms in zip(of, lines)]
        of = [[(g - mean) / by for g in gs] for gs, mean, by in zip(of, inner, sums)]
        gradient = [list(line) for line in zip(*of)] if k % 2 == 0 else of
    gradient = [[g * e for g, e in zip(gs, es)] for gs, es in zip(gradient, exponentials)]
    assert len(gradient) == size
    values = [[[entry.value for entry in row] for row in matrix] for matrix in (result, gradient)]
    return forward, Counted.done, values[0], values[1]


@pytest.mark.parametrize("streams, iterations", [(2, 3), (3, 1), (4, 20)])
def test_sinkhorn_flops_are_those_of_the_loops(streams: int, iterations: int) -> None:
    logits = torch.randn(streams, streams, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forward, both, result, gradient = sinkhorn(logits.tolist(), iterations)
    leaf = logits.clone().requires_grad_()
    M_t = leaf.exp()
    for _ in range(iterations):
        M_t = M_t / M_t.sum(0, keepdim=True)
        M_t = M_t / M_t.sum(1, keepdim=True)
    (M_t.square().sum() / 2).backward()
    assert torch.allclose(torch.tensor(result, dtype=torch.float64), M_t)
    assert torch.allclose(torch.tensor(gradient, dtype=torch.float64), leaf.grad)
    values = {n: streams, t_max: iterations}
    # Backward makes the forward again, then goes back.
    assert [flops.sinkhorn.subs(values) for flops in MHC.flops] == [forward, both]


@pytest.mark.parametrize("streams", [2, 4, 5])
def test_matrix_flops_are_torch_s(streams: int) -> None:
    """As matrix products, which torch counts itself. The sum of squares, which is none, takes 2nC each way."""
    tokens, width = 3, 7
    X = torch.randn(tokens, streams, width, requires_grad=True)
    phi = torch.randn(streams * width, streams**2 + 2 * streams, requires_grad=True)
    h_pre = torch.randn(tokens, 1, streams, requires_grad=True)
    h_post_res = torch.randn(tokens, streams, streams + 1, requires_grad=True)
    y = torch.randn(tokens, 1, width, requires_grad=True)

    def project() -> Tensor:
        return X.flatten(1) @ phi

    def mix() -> Tensor:
        return torch.bmm(h_pre, X).sum() + torch.bmm(h_post_res, torch.cat([y, X], 1)).sum()

    def counted(function: Callable[[], Tensor]) -> list[int]:
        with FlopCounterMode(display=False) as forward:
            out = function().sum()
        with FlopCounterMode(display=False) as backward:
            out.backward()
        return [forward.get_total_flops(), backward.get_total_flops()]

    values = {n: streams, C: width}
    squares = 2 * streams * width
    assert [tokens * (k.projection.subs(values) - squares) for k in MHC.flops] == counted(project)
    assert [tokens * k.mixes.subs(values) for k in MHC.flops] == counted(mix)


def test_without_constraint_there_is_no_sinkhorn() -> None:
    assert [k.sinkhorn for k in Cost(MHCConfig(connection="hc"), MHC.streams).flops] == [0, 0]


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segment, states",
    # n = 4, 12 sites: C for the first segment, 4C for each that follows.
    [(1, 1 + 11 * 4), (2, 1 + 5 * 4), (3, 1 + 3 * 4), (4, 1 + 2 * 4), (6, 1 + 4), (12, 1), (5, 1 + 2 * 4), (99, 1)],
)
def test_kept_elements_of_twelve_sites(segment: int, states: int) -> None:
    width, tokens = MHC.streams[0].width, 7
    kept = MHC.kept_in_segments
    values = [
        MHC.evaluate(part, tokens=tokens, segment=segment) for part in (kept.states, kept.outputs, kept.coefficients)
    ]
    assert values == [states * width * tokens, 12 * width * tokens, 12 * 25 * tokens]
    assert MHC.evaluate(kept.bytes, tokens=tokens, segment=segment) == 4 * sum(values)
    rows = 6 * width * tokens  # X, u and its norm
    assert MHC.evaluate(MHC.transient, tokens=tokens, segment=segment) == rows * min(segment, 12)


def test_kept_is_the_specification_s() -> None:
    """nC ceil(L / L_r) + CL, less (n - 1)C where the expansion is fused."""
    kept = MHC.kept_in_segments
    assert equal(kept.states + kept.outputs, T * (n * C * sympy.ceiling(L / L_r) + C * L - (n - 1) * C))
    assert equal(kept.coefficients, T * L * (n**2 + 2 * n + 1))
    assert equal(MHC.transient, T * (n + 2) * C * L_r)
    assert equal(MHC.peak, MHC.kept.bytes)
    assert equal(MHC.peak_in_segments, MHC.kept_in_segments.bytes + s * T * C * ((n + 2) * L_r - L))
    assert equal(MHC.kept.states, kept.states.subs(L_r, 1))
    assert equal(MHC.cut, s * n * C * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams, width, sites, connection", [(4, 16, 3, "mhc"), (3, 7, 5, "mhc"), (2, 8, 4, "hc")])
def test_kept_is_what_autograd_saves(streams: int, width: int, sites: int, connection: str, dtype: torch.dtype) -> None:
    config = MHCConfig(n_streams=streams, connection=connection)
    modules = nn.ModuleList(HyperConnection(width, config, index=k) for k in range(sites))
    of = Cost(config, (Stream(width, sites, sites, dtype.itemsize),))

    def saved(tokens: int) -> int:
        def step() -> None:
            state = torch.randn(tokens, 1, width, dtype=dtype, requires_grad=True)
            for site in modules:
                u, mix = site.pre(state)
                state = site.post(state, 2 * u, mix)  # a block that keeps nothing itself
            state.sum().backward()

        return saved_bytes(step, (modules,))

    # The difference, as `hc` also keeps the projection that it spreads from phi: a weight, whatever the tokens.
    assert saved(15) - saved(6) == of.evaluate(of.kept.bytes, tokens=9)
    assert connection == "hc" or saved(6) == of.evaluate(of.kept.bytes, tokens=6)


@pytest.mark.parametrize("streams", range(1, 17))
def test_best_segment_is_the_best(streams: int) -> None:
    for sites in range(1, 150):
        kept = {k: streams * math.ceil(sites / k) + (streams + 2) * k for k in range(1, sites + 1)}
        assert best_segment(streams, sites) == min(kept, key=lambda k: (kept[k], k)), sites


def test_best_segment_of_a_plan_is_near_the_optimum() -> None:
    assert MHC.best_segment() == 3  # sqrt(4 * 12 / 6) = 2.8
    assert MHC.evaluate(L_r) == 3 and MHC.evaluate(L_r, segment=2) == 2


# Plans ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Two streams: three blocks of width 8, then one block of width 12 that is called four times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(8) for _ in range(3))
        self.down = nn.Linear(8, 12)
        self.second = Block(12)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        x = self.down(x)
        for _ in range(4):
            x = self.second(x)
        return x


INPUTS = (torch.zeros(2, 5, 8),)


def test_sizes_of_a_plan() -> None:
    plan = mhc_rewrite.plan(Net(), INPUTS, n_streams=3, exclude="first.1")
    of = cost(plan)
    assert of.streams == (Stream(8, 2, 2, 4), Stream(12, 4, 1, 4))
    assert (of.evaluate(L), of.evaluate(L, over=max)) == (6, 4)
    # By hand: X of the first site C, of the others 3C; transient (n + 2) C L_r with the best L_r, 2 and 2.
    assert of.evaluate(of.kept.states, tokens=10) == 10 * ((1 + 3) * 8 + (1 + 3 * 3) * 12)
    assert of.evaluate(of.transient, tokens=10, over=max) == 10 * 5 * 12 * best_segment(3, 4)
    twice = cost(dataclasses.replace(plan, streams=plan.streams * 2))
    assert (twice.evaluate(L), twice.evaluate(M)) == (12, 3)  # what is in two streams has parameters once
    stream = plan.streams[0]
    wider = dataclasses.replace(
        stream, sites=(dataclasses.replace(stream.sites[0], dtype="torch.float64"), *stream.sites)
    )
    assert cost(dataclasses.replace(plan, streams=(wider,))).streams[0].itemsize == 8  # the widest of a stream
    assert cost(mhc_rewrite.plan(Net().bfloat16(), (INPUTS[0].bfloat16(),))).streams[0].itemsize == 2


@pytest.mark.parametrize("connection", ["mhc", "hc", "deepseek_v4"])
@pytest.mark.parametrize("streams", [2, 4])
def test_parameters_are_those_of_the_model(streams: int, connection: str) -> None:
    fields = {"n_streams": streams, "connection": connection}
    predicted = cost(mhc_rewrite.plan(Net(), INPUTS, **fields))
    converted = mhc_rewrite.mhcify(Net(), INPUTS, **fields)
    sites = [module for module in converted.modules() if isinstance(module, HyperConnection)]
    assert predicted.evaluate(predicted.parameters) == sum(p.numel() for site in sites for p in site.parameters())
    assert predicted.evaluate(M) == len(sites) == 4


def test_parameters_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers", reason="hf: models need the extra `hf`")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    before = sum(p.numel() for p in model.parameters())
    predicted = cost(mhc_rewrite.plan(model))
    converted = mhc_rewrite.mhcify(model)
    assert predicted.evaluate(predicted.parameters) == sum(p.numel() for p in converted.parameters()) - before
    assert predicted.evaluate(predicted.parameters) == 4 * (4 * 16 * 24 + 3 + 24)


def test_one_stream_costs_nothing() -> None:
    of = cost(costs.with_streams(mhc_rewrite.plan(Net(), INPUTS), 1))
    for formula in (of.parameters, of.kept.bytes, of.transient, T * L * of.traffic["boundary"][0].bytes):
        assert of.evaluate(formula, tokens=9) == 0
    assert all(estimate(of, costs.device("h100"), 1e6, fusion, True).added == 0 for fusion in FUSIONS)


# Step time -----------------------------------------------------------------------------------------------------------

# Round figures: a byte a second where memory is to be the limit, else a flop a second.
SLOW_MEMORY = Device("slow memory", 1.0, 2e15, 9e14, 1e15, "", 0.5, "")
SLOW_PRODUCTS = Device("slow products", 1e15, 2e15, 3.0, 1e15, "", 0.5, "")
SLOW_FP32 = Device("slow fp32", 1e15, 2e15, None, 1.0, "", 0.5, "")


def test_the_estimate_by_hand() -> None:
    # Two sites, C = 10, bf16, n = 2: boundary (2n + 2)C = 60 and (3n + 3)C = 90 elements, 30 read again; fp32
    # coefficients 2 * 6 + 9 and 3 * 6 + 9; the replaced adds 6C = 60 elements.
    of = Cost(MHCConfig(n_streams=2), (Stream(10, 2, 2, 2),))
    moved = 2 * (2 * 60 + 4 * 21), 2 * (2 * (90 + 30) + 4 * 27)
    slow = estimate(of, SLOW_MEMORY, 5e15)
    assert slow.added == moved[0] + moved[1] - 2 * 2 * 60
    assert estimate(of, SLOW_MEMORY, 5e15, recompute=True).added == slow.added + moved[0]
    assert slow.baseline == 6 * 5e15 / (0.5 * 2e15) and slow.overhead == slow.added / slow.baseline
    # Products at a third of tf32; x @ phi and the squares: 2nC (n^2 + 2n + 1), backward 2nC (2n^2 + 4n + 1).
    products = 2 * 40 * 9, 2 * 40 * 17
    assert estimate(of, SLOW_PRODUCTS, 1).added == pytest.approx(sum(products) / 1.0, rel=1e-9)
    # All in fp32: the mixes 2nC + 2n(n + 1)C and twice that, and Sinkhorn-Knopp's 4 + 240 and 488 + 4 + 560.
    rest = 2 * (160 + 244), 2 * (320 + 244 + 560 + 4)
    assert estimate(of, SLOW_FP32, 1).added == pytest.approx(sum(products) + sum(rest), rel=1e-9)


def test_a_model_in_fp32_is_estimated_in_fp32() -> None:
    sizes = (Stream(10, 2, 2, 4),)
    assert estimate(Cost(MHCConfig(), sizes), SLOW_MEMORY, 1e15).baseline == 6e15 / (0.5 * 1e15)
    assert any("in fp32" in text for text in costs.assumptions(Cost(MHCConfig(), sizes), SLOW_MEMORY, 1.0)[1:2])
    with pytest.raises(ConfigError, match="fp64"):
        estimate(Cost(MHCConfig(), (Stream(10, 2, 2, 8),)), SLOW_MEMORY, 1.0)


def test_devices() -> None:
    assert set(costs.devices()) == {"h100", "a100", "mi300x", "cpu"}
    for of in costs.devices().values():
        assert of.title and of.source and of.utilisation_source and 0 < of.utilisation < 1
        assert 0 < of.bandwidth < of.fp32 < of.bf16
    with pytest.raises(ConfigError, match=r"'h200'.* h100, a100, mi300x, cpu"):
        costs.device("h200")


def test_the_paper_s_model() -> None:
    of = costs.paper(4)
    assert (of.evaluate(L), of.evaluate(C), of.best_segment()) == (60, 2560, 6)
    # Overheads fall with fusion and rise with n; what they come to is the model's business.
    by_fusion = [estimate(of, costs.device("h100"), costs.PAPER_PARAMETERS, fusion).overhead for fusion in FUSIONS]
    by_n = [estimate(costs.paper(k), costs.device("h100"), costs.PAPER_PARAMETERS).overhead for k in (1, 2, 4, 8)]
    assert by_fusion == sorted(by_fusion, reverse=True) and by_n == sorted(by_n)


# The command ---------------------------------------------------------------------------------------------------------


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells under the rule of the table that follows a heading."""
    lines = iter(text.partition(heading)[2].splitlines())
    for line in lines:
        if set(line.strip()) == {"-"}:
            break
    found = []
    for line in lines:
        if not line.strip():
            break
        found.append(line.split())
    return found


@pytest.mark.usefixtures("folder")
class TestCommand:
    def test_formulas_and_numbers(self) -> None:
        result = run("cost", "nets.py:make", "--n", "1,4", "--tokens", "100", "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        assert "Net: 3 sites, C = 8, 4 bytes an element" in result.stdout
        assert "C (5 n + 1)" in result.stdout and "M (C n (n^2 + 2 n) + n^2 + 2 n + 3)" in result.stdout
        one, four = rows(result.stdout, "numbers for 100 tokens")
        assert one == ["1", "nothing", "is", "rewritten"]
        moved = 3 * 100 * (10 * 8 * 4 + 65 * 4) / 1e6
        assert four[:3] == ["4", f"{3 * (4 * 8 * 24 + 27):,}", f"{moved:.1f}"]

    def test_the_estimate_is_marked_and_its_assumptions_stand_below(self) -> None:
        output = run("cost", "nets.py:make", "--n", "2", "--device", "a100").stdout
        assert "ESTIMATE, not measured" in output
        for text in (costs.device("a100").source, "40% of the peak in fp32", "282 parameters", "lower bound"):
            assert " ".join(text.split()) in " ".join(output.split())
        model, inputs = spec.load("nets.py:make")
        of = cost(mhc_rewrite.plan(model, inputs, n_streams=2))
        shares = [estimate(of, costs.device("a100"), 290, f, r).overhead for f in FUSIONS for r in (False, True)]
        (row,) = rows(run("cost", "nets.py:make", "--n", "2", "--device", "a100", "--parameters", "290").stdout, "ESTI")
        assert row == ["2", *(f"{share:.1%}" for share in shares)]

    def test_the_paper(self) -> None:
        output = run("cost", "paper").stdout
        table = {row[0]: row[1:] for row in rows(output, "ESTIMATE")}
        assert [table[k][-2:] for k in "1248"] == [["-", "0.0%"], ["-", "3.0%"], ["6.7%", "6.7%"], ["-", "12.0%"]]
        for k in (2, 4, 8):
            shares = [
                estimate(costs.paper(k), costs.device("h100"), costs.PAPER_PARAMETERS, f, r).overhead
                for f in FUSIONS
                for r in (False, True)
            ]
            assert table[str(k)][:6] == [f"{share:.1%}" for share in shares]
        assert "arXiv:2512.24880" in output and "C = 2560" in output and "4.14e+09 parameters" in output

    def test_another_device_gives_other_figures(self) -> None:
        assert rows(run("cost", "paper").stdout, "ESTI") != rows(run("cost", "paper", "--device", "cpu").stdout, "ESTI")

    @pytest.mark.parametrize(
        "arguments, code, message",
        [
            (("paper", "--device", "h200"), 2, "The known ones are: h100, a100, mi300x, cpu"),
            (("paper", "--n", "0"), 2, "from 1 to 16, such as 1,2,4,8, not '0'"),
            (("paper", "--n", "2,17"), 2, "from 1 to 16"),
            (("paper", "--n", "two"), 2, "from 1 to 16"),
            (("paper", "--n", "1,,2"), 2, "from 1 to 16"),
            (("papers",), 2, "'papers' is no model"),
            (("nets.py:plain",), 1, "residual"),
        ],
    )
    def test_mistakes(self, arguments: tuple[str, ...], code: int, message: str) -> None:
        result = run("cost", *arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr
