"""The relatives of mHC: H_res against direct implementations, what it keeps, where it starts and is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import connections_by_hand as by_hand
from mhc_rewrite.connections import CONNECTIONS, STARTS
from mhc_rewrite.kernels.reference import Coefficients

F64 = torch.float64
FORMS = [(name, n) for name, defined in by_hand.STREAMS.items() for n in defined]
# Direct implementations take a tensor an entry: of the large ones these show all that the others do.
COMPARED = [(name, n) for name, n in FORMS if n <= 5 or n in (8, 16)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters(name: str, n: int, tokens: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """raw (tokens, K), alpha and bias, with logits of this size."""
    columns = 2 * n + by_hand.COLUMNS[name](n)
    alpha = torch.tensor([0.7, -0.4, 1.3], dtype=F64)
    return scale * 0.6 * drawn(tokens, columns, seed=1), alpha, scale * 0.6 * drawn(columns, seed=2)


def direct(name: str) -> Callable[[Tensor, Tensor, Tensor, int], Coefficients]:
    """The mappings by hand: H_pre and H_post as mHC's, H_res entry by entry."""

    def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
        scale = torch.stack([alpha[0]] * n + [alpha[1]] * n + [alpha[2]] * (raw.shape[-1] - 2 * n))
        s = scale * raw + bias
        pre, post = (1 / (1 + torch.exp(-s[..., k * n : (k + 1) * n])) for k in (0, 1))
        return Coefficients(pre, 2 * post, by_hand.H_RES[name](s[..., 2 * n :], n))

    return mappings


def values_and_gradients(
    function: Callable[[Tensor, Tensor, Tensor, int], Coefficients], given: tuple[Tensor, Tensor, Tensor], n: int
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in given]
    made = function(*leaves, n)
    loss = sum((drawn(*h.shape, seed=k).to(h) * h).sum() for k, h in enumerate(made))
    return [*(h.detach() for h in made), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name,n", FORMS)
def test_columns_and_shapes(name: str, n: int) -> None:
    connection = CONNECTIONS[name]
    assert connection.columns(n) == by_hand.COLUMNS[name](n) and not connection.refuses(n)
    raw, alpha, bias = parameters(name, n, 3, 1.0)
    for given in (raw, raw[:1], raw[:0], raw.view(1, 3, -1)):
        pre, post, res = connection.function(given, alpha, bias, n)
        assert pre.shape == post.shape == (*given.shape[:-1], n) and res.shape == (*given.shape[:-1], n, n)
        assert pre.dtype == post.dtype == res.dtype == F64


@pytest.mark.parametrize("scale", (1.0, 10.0))
@pytest.mark.parametrize("name,n", COMPARED)
def test_equals_the_direct_implementation(name: str, n: int, scale: float) -> None:
    given = parameters(name, n, 12, scale)
    got, want = (values_and_gradients(f, given, n) for f in (CONNECTIONS[name].function, direct(name)))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    narrow = values_and_gradients(CONNECTIONS[name].function, tuple(t.float() for t in given), n)
    for mine, other in zip(narrow, want, strict=True):
        assert mine.dtype == torch.float32
        # Gradients of large logits are large where they are not nothing, and TBP's bounds sum up to 16 numbers.
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=2e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("scale", (1.0, 10.0))
@pytest.mark.parametrize("name,n", FORMS)
def test_what_h_res_keeps(name: str, n: int, scale: float) -> None:
    """In fp32: sums of rows and columns of 1 and no entry below 0, or lengths and angles."""
    given = tuple(t.float() for t in parameters(name, n, 500, scale))
    res = CONNECTIONS[name].function(*given, n).res.double()
    if name == "cayley":
        assert (res.mT @ res - torch.eye(n, dtype=F64)).abs().max() < 1e-6
        return
    assert max((res.sum(axis) - 1).abs().max() for axis in (-1, -2)) < 1e-6
    assert res.min() > -1e-6
    if name != "identity" and n > 1:
        assert (res - res[:1]).abs().max() > 0.1, "the same for all tokens"


@pytest.mark.parametrize("size", (0.0, 30.0, 1e4))
@pytest.mark.parametrize("name", by_hand.H_RES)
def test_any_logits_give_finite_numbers(name: str, size: float) -> None:
    n = 4
    raw, alpha, bias = parameters(name, n, 50, 1.0)
    given = tuple(t.float() for t in (size * torch.sign(raw), alpha, size * bias))
    for number in values_and_gradients(CONNECTIONS[name].function, given, n):
        assert number.isfinite().all()


@pytest.mark.parametrize("name", by_hand.H_RES)
def test_precision_does_not_follow_the_users_matmuls(name: str) -> None:
    """Products in tf32 or bf16, as a training script allows them for its model, would cost the sums three digits."""
    n = 4
    given = tuple(t.float() for t in parameters(name, n, 20, 1.0))
    want = CONNECTIONS[name].function(*given, n).res
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = CONNECTIONS[name].function(*given, n).res
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)
    traced = make_fx(CONNECTIONS[name].function, tracing_mode="symbolic")(*given, n)
    for node in traced.graph.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            assert node.meta["val"].dtype == F64, node


@pytest.mark.parametrize("name", by_hand.H_RES)
def test_can_be_traced_for_any_number_of_tokens(name: str) -> None:
    n, function = 4, CONNECTIONS[name].function
    raw, alpha, bias = parameters(name, n, 7, 1.0)
    traced = make_fx(function, tracing_mode="symbolic")(raw, alpha, bias, n)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"], "constants have to be copied to a GPU"
    for tokens in (1, 5):
        for mine, want in zip(traced(raw[:tokens], alpha, bias, n), function(raw[:tokens], alpha, bias, n)):
            torch.testing.assert_close(mine, want, rtol=0, atol=0)
    one = make_fx(function, tracing_mode="symbolic")(raw[:1], alpha, bias, n)
    for mine, want in zip(one(raw[:1], alpha, bias, n), function(raw[:1], alpha, bias, n)):
        torch.testing.assert_close(mine, want, rtol=0, atol=0)


class Functions(nn.Module):
    """All of them in one graph."""

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        alpha, *raw_and_bias = given
        made = []
        for number, name in enumerate(by_hand.H_RES):
            raw, bias = raw_and_bias[2 * number : 2 * number + 2]
            made += CONNECTIONS[name].function(raw, alpha, bias, 4)
        return tuple(made)


def of_all_functions(tokens: int) -> list[Tensor]:
    given = [parameters(name, 4, tokens, 1.0) for name in by_hand.H_RES]
    return [t.float() for t in (given[0][1], *(t for raw, _, bias in given for t in (raw, bias)))]


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch exports to ONNX with the packages of the extra `export`")
    runtime = pytest.importorskip("onnxruntime", reason="of the extra `export`")
    example, file = of_all_functions(3), str(tmp_path / "functions.onnx")
    tokens = torch.export.Dim("tokens")
    free = tuple({0: tokens} if t.dim() == 2 else None for t in example)
    torch.onnx.export(Functions(), tuple(example), dynamo=True, dynamic_shapes=(free,), verbose=False).save(file)
    session = runtime.InferenceSession(file)
    for given in (example, of_all_functions(5)):
        made = session.run(None, {name.name: t.numpy() for name, t in zip(session.get_inputs(), given, strict=True)})
        for mine, want in zip(made, Functions()(*given), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), want, rtol=1e-5, atol=1e-6)


# -- starts ----------------------------------------------------------------------------------------------------------


def started(name: str, n: int, start: str, index: int = 0) -> tuple[Tensor, Coefficients]:
    """phi, and the coefficients of one token at the start."""
    columns = 2 * n + by_hand.COLUMNS[name](n)
    phi, alpha, bias = (torch.full(shape, torch.nan, dtype=F64) for shape in ((n * 3, columns), (3,), (columns,)))
    CONNECTIONS[name].starts[start](phi, alpha, bias, n, index)
    assert torch.equal(alpha, torch.full((3,), 0.01, dtype=F64))
    made = CONNECTIONS[name].function(drawn(1, n * 3) @ phi, alpha, bias, n)
    return phi, Coefficients(*(h.squeeze(0) for h in made))


@pytest.mark.parametrize("name", by_hand.H_RES)
def test_every_start_is_there(name: str) -> None:
    assert set(CONNECTIONS[name].starts) == set(STARTS)


@pytest.mark.parametrize("name,n", [(name, n) for name, n in FORMS if n > 1])
def test_preserve_keeps_and_reads_the_mean(name: str, n: int) -> None:
    """Sites of a stream in any order, each given what the one before made."""
    X = drawn(1, 5).expand(n, 5)
    reads = set()
    for index in range(2 * n):
        phi, h = started(name, n, "preserve", index)
        assert not phi.any()
        torch.testing.assert_close(h.pre @ X, X.mean(0), rtol=0, atol=1e-13)
        y = drawn(5, seed=index)
        new = h.res @ X + h.post[:, None] * y
        torch.testing.assert_close(new.mean(0), X.mean(0) + y, rtol=0, atol=1e-13)
        assert (new - new.mean(0)).norm() > 0.02 * new.mean(0).norm(), "streams do not part"
        assert 0.2 < h.post.min() and h.post.max() < 1.8
        X = new
        reads.add(tuple(h.pre.tolist()))
    assert n == 2 or len(reads) > 1, "all sites read alike"


MATRICES = {"preserve": 0.2, "equal": 0.2}


@pytest.mark.parametrize("start", ("preserve", "equal", "near_identity"))
@pytest.mark.parametrize("name,n", [(name, n) for name, n in FORMS if n > 1])
def test_where_h_res_starts(name: str, n: int, start: str) -> None:
    beside = math.exp(-8.0)
    uniform = MATRICES.get(start, n * beside / (1 + (n - 1) * beside))
    eye = torch.eye(n, dtype=F64)
    want = (1 - uniform) * eye + uniform / n
    if name in ("identity", "cayley"):
        want = eye
    elif name == "kromhc":
        factor = (1 - uniform) * torch.eye(2, dtype=F64) + uniform / 2
        want = torch.ones(1, 1, dtype=F64)
        while len(want) < n:
            want = torch.kron(want, factor)
    torch.testing.assert_close(started(name, n, start, 3)[1].res, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("start", ("equal", "near_identity"))
@pytest.mark.parametrize("name,n", [(name, n) for name, n in FORMS if n > 1])
def test_equal_streams_stay_equal(name: str, n: int, start: str) -> None:
    for index in (0, n + 1):
        h = started(name, n, start, index)[1]
        one_hot = torch.full((n,), 0.1 / (n - 1), dtype=F64)
        one_hot[index % n] = 0.9
        torch.testing.assert_close(h.pre, one_hot, rtol=1e-13, atol=0)
        assert torch.equal(h.post, torch.ones_like(h.post))
        torch.testing.assert_close(h.res.sum(-1), torch.ones_like(h.post), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ("mhc_lite", "kromhc", "tbp"))
def test_paper_prefers_one_stream(name: str) -> None:
    phi, h = started(name, 4, "paper", 6)
    assert not phi.any()
    want = torch.sigmoid(torch.tensor([-1.0, -1.0, 1.0, -1.0], dtype=F64))
    torch.testing.assert_close(h.pre, want)
    torch.testing.assert_close(h.post, 2 * want)
    if name == "tbp":  # logits of 0: half of what can be had
        half = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4, 3 / 8, 3 / 16, 3 / 16]], dtype=F64)
        torch.testing.assert_close(h.res[:2], half)
    else:
        assert 0 < (h.res - torch.eye(4, dtype=F64)).abs().max() < 0.01


def test_one_stream_has_nothing_to_preserve() -> None:
    for name in by_hand.H_RES:
        with pytest.raises(ValueError, match="n_streams=1"):
            started(name, 1, "preserve")
        assert torch.equal(started(name, 1, "paper")[1].res, torch.ones(1, 1, dtype=F64))


# -- where they are not defined --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_hand.H_RES)
def test_other_numbers_of_streams_are_refused(name: str) -> None:
    for n in range(1, 17):
        why = CONNECTIONS[name].refuses(n)
        assert bool(why) is (n not in by_hand.STREAMS[name]), n
        if why:
            assert str(n) in why and "connection='tbp'" in why
            assert not CONNECTIONS["tbp"].refuses(n), "advice that works"
    assert name != "kromhc" or "4 or 8" in CONNECTIONS[name].refuses(6)
