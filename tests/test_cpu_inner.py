"""The operators that are given their coefficients: aten's against autograd through plain code in fp64, and the CPU
kernels against aten's with fp64 coefficients, which rounds the streams where the kernels do."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_rewrite.kernels import aten, cpu, reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = 0.1  # large, so that a wrong one shows
STREAMS = {"X", "y", "g_u", "g_state"}  # what stays in its dtype where coefficients become fp64

ALONE = ["project", "project_backward", "read", "read_products"]
BEHIND = ["post_project", "post_project_backward", "post_read_products"]

FORMS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (16, 16), (2, 1), (4, 1), (16, 1)]
COLUMNS = [0, 1, 7, 24, 130, 288]
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F32, F16), (BF16, F16)]
SIZES = list(itertools.product((1, 3, 8, 37), (8, 24, 33, 128)))
# Every form meets every type and number of columns in some of the sizes.
CASES = [
    (*form, *types, columns, *size)
    for k, (form, types, columns) in enumerate(itertools.product(FORMS, TYPES, COLUMNS))
    for m, size in enumerate(SIZES)
    if (m + 5 * k) % 16 < 2
]

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler or ninja on this machine")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Empty buffers hold NaN, those of C++ too: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def given(
    n: int, M: int, dtype: torch.dtype, y_dtype: torch.dtype, columns: int, tokens: int, width: int, post: bool
) -> dict[str, Any]:
    """Arguments by name, coefficients in fp32, for a state that is given, or for the one that `post` makes."""
    S = n if post else M
    made = torch.promote_types(dtype, y_dtype) if post else dtype
    generator = torch.Generator().manual_seed(1)

    def gaussian(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    arguments = {
        "X": gaussian(tokens, M, width, dtype=dtype),
        "y": gaussian(tokens, width, dtype=y_dtype),
        "h_post": gaussian(tokens, n),
        "h_res": gaussian(tokens, n, M),
        "phi": gaussian(S * width, columns) / (S * width) ** 0.5,
        "h_pre": gaussian(tokens, S),
        "g_u": gaussian(tokens, width, dtype=made),
        "g_state": gaussian(tokens, S, width, dtype=made),
        "g_raw": gaussian(tokens, columns),
        "eps": EPS,
    }
    wide = in_double(arguments)
    raw, r = call(aten, "post_project", wide)[1:] if post else call(aten, "project", wide)
    return {**arguments, "raw": raw.float(), "r": r.float()}


def in_double(arguments: dict[str, Any], kept: set[str] = STREAMS) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and name not in kept else value
        for name, value in arguments.items()
    }


def call(kernels: ModuleType, name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The function of that name on the arguments that it has in aten.py; where it has one result, a tuple of it."""
    made = getattr(kernels, name)(*(arguments[place] for place in inspect.signature(getattr(aten, name)).parameters))
    return (made,) if isinstance(made, Tensor) else tuple(made)


def assert_as_in_aten(name: str, arguments: dict[str, Any]) -> None:
    # The products meet no coefficient that would make their arithmetic fp64.
    want = call(aten, name, in_double(arguments, set() if name == "read_products" else STREAMS))
    got = call(cpu, name, arguments)
    assert len(got) == len(want)
    close = 1e-5 if arguments["X"].dtype == arguments["y"].dtype == F32 else 2e-3
    for place, (mine, truth) in enumerate(zip(got, want)):
        assert mine.dtype == (F32 if truth.dtype == F64 else truth.dtype), (name, place)
        assert mine.shape == truth.shape and mine.isfinite().all(), (name, place)
        difference = (mine.double() - truth.double()).norm()
        # A single number may be a difference of large ones: it is held against the size of what it is made of.
        assert difference <= close * (truth.double().norm() + (0.1 if truth.numel() < 4 else 0)), (name, place)


# -- aten against autograd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,M", FORMS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("post", [False, True])
def test_aten(n: int, M: int, columns: int, post: bool) -> None:
    arguments = in_double(given(n, M, F32, F32, columns, 5, 24, post), set())
    names = ["X", "phi", "h_pre", *["y", "h_post", "h_res"] * post]
    leaves = {name: arguments[name].requires_grad_() for name in names}
    mixed = reference.mix_out(*(leaves[name] for name in ("X", "y", "h_post", "h_res"))) if post else leaves["X"]
    r = (mixed.flatten(1).square().mean(-1, keepdim=True) + EPS).sqrt()
    raw, u = mixed.flatten(1) / r @ leaves["phi"], reference.mix_in(mixed, leaves["h_pre"])
    arguments |= {"raw": raw.detach(), "r": r.detach()}
    outputs, gradients = [raw, u], [arguments["g_raw"], arguments["g_u"]]
    if post:
        outputs, gradients = [mixed, *outputs], [arguments["g_state"], *gradients]
    of = dict(zip(names, torch.autograd.grad(outputs, list(leaves.values()), gradients)))
    with torch.no_grad():
        if post:
            assert_equal(call(aten, "post_project", arguments), (mixed, raw, r))
            backward = [of[name] for name in ("X", "y", "h_post", "h_res", "phi")]
            assert_equal(call(aten, "post_project_backward", arguments), backward)
            assert_equal(call(aten, "post_read_products", arguments), [of["h_pre"]])
        else:
            assert_equal(call(aten, "project", arguments), (raw, r))
            assert_equal(call(aten, "project_backward", arguments), [of["X"], of["phi"]])
            assert_equal(call(aten, "read_products", arguments), [of["h_pre"]])
            assert_equal(call(aten, "read", arguments), [u])


def assert_equal(got: Any, want: Any) -> None:
    assert len(got) == len(want)
    for mine, truth in zip(got, want):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)


# -- the CPU kernels against aten --------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("n,M,dtype,y_dtype,columns,tokens,width", CASES)
def test_behind_a_post(
    n: int, M: int, dtype: torch.dtype, y_dtype: torch.dtype, columns: int, tokens: int, width: int
) -> None:
    arguments = given(n, M, dtype, y_dtype, columns, tokens, width, post=True)
    for name in BEHIND:
        assert_as_in_aten(name, arguments)


@needs_kernels
@pytest.mark.parametrize("n,M,dtype,y_dtype,columns,tokens,width", [case for case in CASES if case[2] == case[3]])
def test_alone(n: int, M: int, dtype: torch.dtype, y_dtype: torch.dtype, columns: int, tokens: int, width: int) -> None:
    arguments = given(n, M, dtype, y_dtype, columns, tokens, width, post=False)
    for name in ALONE:
        assert_as_in_aten(name, arguments)


@needs_kernels
@pytest.mark.parametrize("dtype,width", [(F32, 768), (F32, 769), (BF16, 1536)])
def test_around_the_cache(threads: None, dtype: torch.dtype, width: int) -> None:
    """Results of more than 4 MiB are written past the cache, in whole vectors; by one thread and by two."""
    for post, names in ((False, ALONE), (True, BEHIND)):
        arguments = given(2, 2, dtype, dtype, 7, 1400, width, post)
        for name in names:
            assert_as_in_aten(name, arguments)


@needs_kernels
def test_same_passes_as_the_fused_kernels() -> None:
    """A connection's function between the halves computes what the fused kernel does: the state and raw to the bit."""
    arguments = given(4, 4, F32, F32, 24, 37, 100, post=True)
    site = torch.tensor([0.7, -0.4, 1.3]), torch.linspace(-1, 1, 24)
    branch = [arguments[name] for name in ("X", "y", "h_post", "h_res")]
    state, u, _, _, raw, r = cpu.boundary(*branch, arguments["phi"], *site, "mhc", 20, EPS)
    made = cpu.post_project(*branch, arguments["phi"], EPS)
    assert all(torch.equal(mine, fused) for mine, fused in zip(made, (state, raw, r)))
    h = reference.coefficients(raw, *site, "mhc", 20)
    torch.testing.assert_close(cpu.read(state, h.pre), u)


@needs_kernels
def test_no_operand_is_read_in_another_dtype() -> None:
    arguments = given(2, 2, BF16, BF16, 3, 3, 8, post=True)
    for name in BEHIND[1:]:
        with pytest.raises(RuntimeError, match="another dtype"):
            call(cpu, name, arguments | {"g_u": arguments["g_u"].float()})


@needs_kernels
@pytest.mark.parametrize("columns", [0, 7])
@pytest.mark.parametrize("dtype,y_dtype", [(F32, F32), (F32, BF16), (F16, F16)])
@pytest.mark.parametrize("n,M", [(3, 3), (4, 4), (4, 1)])
def test_declared_as_they_are(n: int, M: int, dtype: torch.dtype, y_dtype: torch.dtype, columns: int) -> None:
    """Compiled graphs are built on the shapes, dtypes and strides that cpu.py declares for operators.cpp."""
    for names, post in ((ALONE, False), (BEHIND, True)):
        arguments = given(n, M, dtype, y_dtype, columns, 9, 16, post)
        for name in names:
            operator = getattr(torch.ops.mhc_rewrite_cpu, name).default
            args = tuple(arguments[place.name] for place in operator._schema.arguments)
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
